#include "labels.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../labels.h"
#include "../results.h"
#include "kernels/cuda/api.h"

namespace aep {

void check_labels_if_asked(const char* op, const Tensor& target, int64_t classes, const int64_t* ignore_index) {
  if (!labels_asked()) return;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  TORCH_CHECK(capture == cudaStreamCaptureStatusNone, "aep::", op,
              ": check_labels must be off while a CUDA graph is captured (it waits for the device), got it on");
  const Tensor found = fresh({1}, at::kLong, target);
  C10_CUDA_CHECK(kernels::cuda::launch_find_bad_label(target.const_data_ptr<int64_t>(), target.stride(0),
                                                      target.size(0), classes, ignore_index,
                                                      found.mutable_data_ptr<int64_t>(), stream));
  const int64_t position = found.item<int64_t>();
  if (position >= 0) {
    refuse_label(op, target.select(0, position).item<int64_t>(), position, classes, ignore_index != nullptr);
  }
}

}  // namespace aep
