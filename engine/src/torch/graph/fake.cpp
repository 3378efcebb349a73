// at::cuda::CUDAGraph as ATen/cuda/CUDAGraph.h of 2.11.0 declares it, writing down what is called.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

enum cudaStreamCaptureMode { Global, ThreadLocal, Relaxed };

static std::string calls;

namespace at {
namespace cuda {

struct CUDAGraph {
  CUDAGraph(bool keep_graph = false);
  ~CUDAGraph();
  void capture_begin(std::pair<unsigned long long, unsigned long long> pool,
                     cudaStreamCaptureMode mode);
  void capture_end();
  void replay();
  std::pair<unsigned long long, unsigned long long> pool();
  std::pair<unsigned long long, unsigned long long> own{3, 4};
  char rest[88];
};

CUDAGraph::CUDAGraph(bool keep_graph) { calls += keep_graph ? "kept " : "new "; }
CUDAGraph::~CUDAGraph() { calls += "gone "; }
void CUDAGraph::capture_begin(std::pair<unsigned long long, unsigned long long> pool,
                              cudaStreamCaptureMode mode) {
  char text[64];
  std::snprintf(text, sizeof(text), "begin(%llu, %llu, %d) ", pool.first, pool.second, (int)mode);
  calls += text;
  if (pool.first == 13) throw std::runtime_error("an unlucky pool");
  if (pool.first != 0) own = pool;
}
void CUDAGraph::capture_end() { calls += "end "; }
void CUDAGraph::replay() { calls += "replay "; }
std::pair<unsigned long long, unsigned long long> CUDAGraph::pool() { return own; }

} // namespace cuda
} // namespace at

// What was called since the last time.
extern "C" const char *fake_calls() {
  static std::string told;
  told = std::move(calls);
  calls.clear();
  return told.c_str();
}
