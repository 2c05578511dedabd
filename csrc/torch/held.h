// Gradients that the forward has formed and holds: what they are multiplied by meanwhile, and what the backward makes
// of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <torch/csrc/autograd/variable.h>

#include <string_view>

namespace aep {

using at::Tensor;

// What a gradient of `type` is multiplied by while it is held. The mean divides by the number of rows: in float16 most
// of the gradient would be lost below its smallest number before a GradScaler's factor reaches it. So that division is
// taken back, up to 1024, by a power of two, which rounds nothing.
double held_factor(at::ScalarType type, const c10::SymInt& rows, std::string_view reduction);

// How many hold a saved tensor that a backward has unpacked, if nobody else does: the backward, and the graph too, unless
// what it has is what the caller's hooks made of the tensor. To be asked where it is saved.
int64_t holders_of_saved();

// The held gradient (3 dimensions at most) times the incoming one, without the factor. Where the graph is not kept and no
// more than `holders` have the tensor (a caller of the operator itself may), it is of no further use: it is scaled where
// it lies, which costs nothing where the factor is 1, and handed on. kAnyHolders: whoever else has it expects that.
constexpr int64_t kAnyHolders = 0;
Tensor scaled(Tensor held, const Tensor& grad_loss, double factor, int64_t holders);

// In a backward that records a graph: the graph of a second derivative must lead to what the loss came from, and there
// say that it cannot. The results alone would pass for constants.
void refuse_second(const char* op, torch::autograd::variable_list& result);

}  // namespace aep
