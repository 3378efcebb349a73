// One step of AdamW (arXiv 1711.05101) over all tensors, in one pass: moments and masters are f32, the
// served tensor is what the master rounds to, and the gradient is zero afterwards.

// As in adamw.rs.
struct AdamW {
  const u64 *tensors; // [tensors, 6]: addresses of served, master, gradient, moments; elements
  const int *chunks;  // [blocks, 2]: the tensor, and which chunk of it
  float scale;        // of the gradient
  float beta1;
  float beta2;
  float kept;         // 1 - learning rate * weight decay
  float rate;         // learning rate / (1 - beta1^t)
  float root;         // sqrt(1 - beta2^t)
  float eps;
};

constexpr i64 CHUNK = 8192;
constexpr int ADAMW_THREADS = 256;

// Four elements, at an address that is a multiple of their size.
template <class T> struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// The new master; the moments become those of this step.
DEVICE float step(const AdamW &a, float master, float gradient, float &first, float &second) {
  const float g = gradient * a.scale;
  first = a.beta1 * first + (1.0f - a.beta1) * g;
  second = a.beta2 * second + (1.0f - a.beta2) * g * g;
  return master * a.kept - a.rate * (first / (sqrtf(second) / a.root + a.eps));
}

// Grid: chunks.
template <class T> DEVICE void adamw(const AdamW &a) {
  typedef Line<float> L;
  const u64 *parts = a.tensors + (i64)a.chunks[2 * blockIdx.x] * 6;
  T *served = (T *)parts[0];
  float *master = (float *)parts[1], *gradient = (float *)parts[2];
  float *first = (float *)parts[3], *second = (float *)parts[4];
  const i64 begin = a.chunks[2 * blockIdx.x + 1] * CHUNK;
  const i64 end = begin + CHUNK < (i64)parts[5] ? begin + CHUNK : (i64)parts[5];
  const bool aligned = (parts[0] | parts[1] | parts[2] | parts[3] | parts[4]) % 16 == 0;
  const i64 whole = aligned ? begin + (end - begin) / 4 * 4 : begin;
  // Two lines at a time, so that more loads are under way.
  constexpr int AT_ONCE = 2, APART = ADAMW_THREADS * 4;
  for (i64 i = begin + threadIdx.x * 4; i < whole; i += AT_ONCE * APART) {
    L p[AT_ONCE], g[AT_ONCE], m[AT_ONCE], v[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const i64 at = i + n * APART;
      if (at >= whole) break;
      p[n] = *(L *)(master + at);
      g[n] = *(L *)(gradient + at);
      m[n] = *(L *)(first + at);
      v[n] = *(L *)(second + at);
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const i64 at = i + n * APART;
      if (at >= whole) break;
      Quad<T> out;
      L zero;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        p[n].at[j] = step(a, p[n].at[j], g[n].at[j], m[n].at[j], v[n].at[j]);
        put(out.at[j], p[n].at[j]);
        zero.at[j] = 0.0f;
      }
      *(L *)(master + at) = p[n];
      *(L *)(gradient + at) = zero;
      *(L *)(first + at) = m[n];
      *(L *)(second + at) = v[n];
      *(Quad<T> *)(served + at) = out;
    }
  }
  for (i64 i = whole + threadIdx.x; i < end; i += ADAMW_THREADS) {
    const float p = step(a, master[i], gradient[i], first[i], second[i]);
    master[i] = p;
    gradient[i] = 0.0f;
    put(served[i], p);
  }
}
