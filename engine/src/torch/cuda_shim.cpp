// Streams, events, memory and graphs of CUDA devices, without CUDA's headers or libraries: all but graphs
// by way of libtorch's interfaces for any device, which its CUDA half fills in once it is loaded, and
// graphs by the names that `at::cuda::CUDAGraph` has there (ATen/cuda/CUDAGraph.h of 2.11.0, checked
// with nm). Every function returns nullptr, or an error message that the caller frees with op_free.
#include "guarded.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;

c10::impl::VirtualGuardImpl streams() {
  TORCH_CHECK(c10::impl::hasDeviceGuardImpl(CUDA), "libtorch's CUDA half is not loaded");
  return c10::impl::VirtualGuardImpl(CUDA);
}

c10::DeviceAllocator &allocator() {
  TORCH_CHECK(c10::GetAllocator(CUDA) != nullptr, "libtorch's CUDA half is not loaded");
  auto *allocator = c10::getDeviceAllocator(CUDA);
  TORCH_CHECK(allocator->initialized(), "no CUDA device has been used yet");
  return *allocator;
}

c10::Device device(int64_t index) {
  return c10::Device(CUDA, static_cast<c10::DeviceIndex>(index));
}

// One stream of the pool for each device: libraries keep a workspace for every stream they have seen. Of
// high priority: what is recorded on it keeps that, wherever it runs.
c10::Stream side_stream(const c10::impl::VirtualGuardImpl &guard, int64_t index) {
  static std::mutex mutex;
  static std::map<int64_t, c10::Stream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  auto known = streams.find(index);
  if (known == streams.end()) {
    known = streams.emplace(index, guard.getStreamFromGlobalPool(device(index), true)).first;
  }
  return known->second;
}

// `function` of libtorch_cuda, by its mangled name.
template <typename F> F *named(const char *name) {
  void *symbol = dlsym(RTLD_DEFAULT, name);
  TORCH_CHECK(symbol != nullptr, "libtorch's CUDA half is not loaded, or is not 2.11: it has no ", name);
  return reinterpret_cast<F *>(symbol);
}

// An at::cuda::CUDAGraph takes 104 bytes in 2.11.0.
constexpr size_t GRAPH_BYTES = 1024;
// cudaStreamCaptureModeThreadLocal: other threads may do with CUDA what they like meanwhile.
constexpr int THREAD_LOCAL = 1;

// Passed and returned in two registers, as MempoolId_t, std::pair<unsigned long long, ..>, is.
using Pool = c10::MempoolId_t;

} // namespace

extern "C" {

// `scaled_dot_product_attention` takes no kernels of cuDNN from now on.
char *op_without_cudnn_attention() {
  return guarded([] { at::globalContext().setSDPUseCuDNN(false); });
}

// The native handle of the stream that this thread uses on a device.
char *op_stream(int64_t index, void **handle) {
  return guarded([&] {
    const auto guard = streams();
    *handle = guard.getStreamNativeHandle(guard.getStream(device(index)));
  });
}

// Gives this thread a stream of the pool, of high priority, once all that was queued is done.
char *op_own_stream(int64_t index) {
  return guarded([&] {
    const auto guard = streams();
    guard.synchronizeDevice(static_cast<c10::DeviceIndex>(index));
    guard.exchangeStream(guard.getStreamFromGlobalPool(device(index), true));
  });
}

// Makes the device's side stream the current one; `before` identifies the one that was.
char *op_side_stream(int64_t index, int64_t *before) {
  return guarded([&] {
    const auto guard = streams();
    guard.synchronizeDevice(static_cast<c10::DeviceIndex>(index));
    *before = guard.exchangeStream(side_stream(guard, index)).id();
  });
}

char *op_restore_stream(int64_t index, int64_t before) {
  return guarded([&] {
    const auto guard = streams();
    const auto side = guard.exchangeStream(c10::Stream(c10::Stream::UNSAFE, device(index), before));
    guard.synchronizeStream(side);
  });
}

// Waits until all that a device was given is done.
char *op_synchronize(int64_t index) {
  return guarded([&] { streams().synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
}

// A point in the stream that this thread uses on a device: the end of what it was given by now.
char *op_event_record(int64_t index, void **event) {
  return guarded([&] {
    const auto stream = streams().getStream(device(index));
    auto made = std::make_unique<c10::Event>(CUDA);
    made->record(stream);
    *event = made.release();
  });
}

char *op_event_wait(void *event) {
  return guarded([&] { static_cast<c10::Event *>(event)->synchronize(); });
}

char *op_event_free(void *event) {
  return guarded([&] { delete static_cast<c10::Event *>(event); });
}

// Bytes: free and in all, as the driver sees them; handed out by the allocator, now and at most;
// held by it, now and at most.
char *op_device_memory(int64_t index, int64_t *bytes) {
  return guarded([&] {
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto at = static_cast<c10::DeviceIndex>(index);
    const auto info = allocator().getMemoryInfo(at);
    const auto stats = allocator().getDeviceStats(at);
    bytes[0] = static_cast<int64_t>(info.first);
    bytes[1] = static_cast<int64_t>(info.second);
    bytes[2] = stats.allocated_bytes[all].current;
    bytes[3] = stats.allocated_bytes[all].peak;
    bytes[4] = stats.reserved_bytes[all].current;
    bytes[5] = stats.reserved_bytes[all].peak;
  });
}

char *op_reset_peak(int64_t index) {
  return guarded([&] { allocator().resetPeakStats(static_cast<c10::DeviceIndex>(index)); });
}

char *op_graph_new(void **graph) {
  return guarded([&] {
    auto *make = named<void(void *, bool)>("_ZN2at4cuda9CUDAGraphC1Eb");
    void *place = std::aligned_alloc(64, GRAPH_BYTES);
    TORCH_CHECK(place != nullptr, "out of memory");
    try {
      make(place, false);
    } catch (...) {
      std::free(place);
      throw;
    }
    *graph = place;
  });
}

// Operations of this thread on its current stream, a side stream, are recorded from here on. Their
// memory comes from a pool, which graphs that are never run at the same time may share; {0, 0}: a
// pool of its own.
char *op_graph_begin(void *graph, uint64_t first, uint64_t second) {
  return guarded([&] {
    named<void(void *, Pool, int)>(
        "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode")(
        graph, Pool{first, second}, THREAD_LOCAL);
  });
}

char *op_graph_end(void *graph) {
  return guarded([&] { named<void(void *)>("_ZN2at4cuda9CUDAGraph11capture_endEv")(graph); });
}

char *op_graph_pool(void *graph, uint64_t *pool) {
  return guarded([&] {
    const Pool own = named<Pool(void *)>("_ZN2at4cuda9CUDAGraph4poolEv")(graph);
    pool[0] = own.first;
    pool[1] = own.second;
  });
}

// Puts the whole graph into the queue of the current stream.
char *op_graph_replay(void *graph) {
  return guarded([&] { named<void(void *)>("_ZN2at4cuda9CUDAGraph6replayEv")(graph); });
}

char *op_graph_free(void *graph) {
  return guarded([&] {
    named<void(void *)>("_ZN2at4cuda9CUDAGraphD1Ev")(graph);
    std::free(graph);
  });
}

} // extern "C"
