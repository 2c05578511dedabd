// _C.CaptureStream: a stream that nobody else has, and that takes what cuBLAS keeps for it along when it goes.
//
// torch keeps a workspace of cuBLAS for every stream that ever multiplied, and a graph captured on that stream writes
// on it at every replay. Its own streams go round: two graphs captured on the same one share a workspace, which lies in
// the memory pool of the first. Torch 2.11 never gives it back; later ones do when one of the graphs dies, although the
// other still writes there.
#include "graph_stream.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace aep {
namespace {

namespace py = pybind11;

void forget(at::cuda::WorkspaceMapWithMutex& kept, const void* stream) {
  const std::unique_lock<std::shared_mutex> lock(kept.mutex);
  for (auto it = kept.map.begin(); it != kept.map.end();) {
    it = std::get<1>(it->first) == stream ? kept.map.erase(it) : std::next(it);
  }
}

class CaptureStream {
 public:
  explicit CaptureStream(int64_t device) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    const cudaError_t error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    throw std::runtime_error(std::string("aep::CaptureStream: no stream can be made: ") + cudaGetErrorString(error));
  }
  CaptureStream(const CaptureStream&) = delete;
  CaptureStream& operator=(const CaptureStream&) = delete;
  ~CaptureStream() {
    forget(at::cuda::cublas_handle_stream_to_workspace(), stream_);
    forget(at::cuda::cublaslt_handle_stream_to_workspace(), stream_);
    if (cudaStreamDestroy(stream_) != cudaSuccess) (void)cudaGetLastError();  // at exit the device may be gone first
  }

  int64_t address() const { return reinterpret_cast<int64_t>(stream_); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

void register_capture_stream(py::module_& module) {
  py::class_<CaptureStream>(module, "CaptureStream",
                            "A CUDA stream that is nobody else's. It goes with this object, and its workspaces too.")
      .def(py::init<int64_t>(), py::arg("device"))
      .def_property_readonly("address", &CaptureStream::address);
}

}  // namespace aep
