// Writing pages, [blocks, kv_heads, 16, head_dim], of elements of 16 or 32 bits.

// As in pages.rs.
struct WriteKv {
  const void *k; // [rows, kv_heads, head_dim], a row `k_stride` elements after the one before
  const void *v; // as k
  void *keys;
  void *values;
  const i64 *slots; // [rows]: block * 16 + offset; -1: the row is not in use
  int kv_heads;
  int head_dim; // a multiple of 8
  int k_stride;
  int v_stride;
};

// Grid: rows. Block: 128.
template <class T> DEVICE void write_kv(const WriteKv &a) {
  const int row = blockIdx.x, lines = a.head_dim / Line<T>::COUNT;
  const i64 slot = a.slots[row];
  if (slot < 0) return;
  for (int i = threadIdx.x; i < a.kv_heads * lines; i += 128) {
    const i64 to = page_row(slot, a.kv_heads, i / lines) * lines + i % lines;
    const T *k = (const T *)a.k + (i64)row * a.k_stride, *v = (const T *)a.v + (i64)row * a.v_stride;
    ((Line<T> *)a.keys)[to] = ((const Line<T> *)k)[i];
    ((Line<T> *)a.values)[to] = ((const Line<T> *)v)[i];
  }
}
