// Spectral normalisation of all layers in one call on the CPU, forward and backward.
//
//   forward    t = W v,  u = t / max(|t|, eps),  s = W'u,  v = s / max(|s|, eps)     one power iteration
//              sigma = u'W v = |s|^2 / max(|s|, eps): known already, so no third product
//              update = false keeps u and v: sigma = u'(W v)
//              weights_sn = W / sigma
//   backward   u and v are constants, so d sigma / dW = u v' and
//              dW = G / sigma - (<G, W> / sigma^2) u v',  with the u, v and sigma of its own forward
//   layout     W is a (rows, cols) matrix. Under channels_last its columns lie in another order than v, which
//              stays logical: v is permuted into memory order and back, W and G are read where they are.
//   precision  W v, norms, sigma and <G, W> in fp64; W't in fp64, from sums of four rows in W's dtype;
//              W / sigma divided and rounded once. The order of additions depends on shapes only.
//   bytes      per weight: forward reads W once for the iteration (a row gives t_i and its share of W't while
//              it is in cache), once to scale it, and writes once: 12 in fp32; backward reads W once, G twice,
//              and writes dW: 16.
//   sources    Miyato et al. 2018 (arXiv 1802.05957); torch.nn.utils.parametrizations.spectral_norm
#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace dcgan {
namespace {
constexpr int64_t Rows = 64;     // of a block of the iteration, each with its own partial W't
constexpr int64_t Chunk = 4096;  // values at a time of the passes over all of W
constexpr int64_t Ahead = 512;   // values between those computed on and those asked for

// ------------------------------------------------------------------------------------------ inner loops
template <typename A, typename B>
DCGAN_CLONES double dot(const A* __restrict a, const B* __restrict b, int64_t n) {
  constexpr int Lanes = 16;
  double lane[Lanes] = {}, total = 0;
  int64_t j = 0;
  for (; j + Lanes <= n; j += Lanes) {
    prefetch<0>(a + j + Ahead, Lanes), prefetch<0>(b + j + Ahead, Lanes);
    for (int l = 0; l < Lanes; ++l) lane[l] += double(a[j + l]) * double(b[j + l]);
  }
  for (; j < n; ++j) total += double(a[j]) * double(b[j]);
  for (int l = 0; l < Lanes; ++l) total += lane[l];
  return total;
}
template <int R, typename A>  // sum += t[0] w[0] + ... of R rows
DCGAN_CLONES void add_rows(const A* __restrict w, int64_t cols, const double* __restrict t,
                           double* __restrict sum) {
  A factor[R];
  for (int r = 0; r < R; ++r) factor[r] = A(t[r]);
  for (int64_t j = 0; j < cols; ++j) {
    A value = 0;
    for (int r = 0; r < R; ++r) value += factor[r] * w[r * cols + j];
    sum[j] += double(value);
  }
}
template <typename A>
DCGAN_CLONES void divide(const A* __restrict x, A divisor, A* __restrict y, int64_t n) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = std::min(from + Stretch, n);
    prefetch<0>(x + from + Ahead, Stretch), prefetch<1>(y + from + Ahead, Stretch);
    for (int64_t j = from; j < to; ++j) y[j] = x[j] / divisor;
  }
}
template <typename A>  // y = g / sigma - v * factor
DCGAN_CLONES void rank_one(const A* __restrict g, A sigma, const A* __restrict v, A factor, A* __restrict y,
                           int64_t n) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = std::min(from + Stretch, n);
    prefetch<0>(g + from + Ahead, Stretch), prefetch<1>(y + from + Ahead, Stretch);
    for (int64_t j = from; j < to; ++j) y[j] = g[j] / sigma - v[j] * factor;
  }
}

inline double length(const std::vector<double>& x) { return std::sqrt(dot(x.data(), x.data(), x.size())); }
// f(column in the logical order, its place in memory)
template <typename F>
void columns(const SnSizes& s, const F& f) {
  const int64_t inputs = s.cols / s.taps;
  for (int64_t i = 0, column = 0; i < inputs; ++i)
    for (int64_t t = 0; t < s.taps; ++t, ++column) f(column, s.channels_last ? t * inputs + i : column);
}
// f(first, n) for chunks of 0 .. total, on all threads
template <typename F>
void in_chunks(int64_t total, const F& f) {
  torch::stable::parallel_for(0, (total + Chunk - 1) / Chunk, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k * Chunk, std::min(Chunk, total - k * Chunk));
  });
}

// One layer's iteration: returns sigma; writes u (rows) and v (cols, in memory order) when `update`.
template <typename A>
double iterate(const A* w, const SnSizes& s, A* u, A* v, double eps, bool update) {
  const int64_t blocks = (s.rows + Rows - 1) / Rows;
  std::vector<double> t(s.rows), sums(update ? blocks * s.cols : 0), v_wide(v, v + s.cols);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * Rows, last = std::min(end * Rows, s.rows); i < last;) {
      const int64_t n = i + 4 <= last ? 4 : 1;  // Rows is a multiple of 4: never across two blocks
      double* sum = update ? &sums[i / Rows * s.cols] : nullptr;
      for (int64_t r = i; r < i + n; ++r) t[r] = dot(w + r * s.cols, v_wide.data(), s.cols);
      if (update && n == 4) add_rows<4>(w + i * s.cols, s.cols, &t[i], sum);
      if (update && n == 1) add_rows<1>(w + i * s.cols, s.cols, &t[i], sum);
      i += n;
    }
  });
  if (!update) return dot(u, t.data(), s.rows);
  std::vector<double> product(sums.begin(), sums.begin() + s.cols);  // W't
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t j = 0; j < s.cols; ++j) product[j] += sums[b * s.cols + j];
  const double norm_t = std::max(length(t), eps), norm_s = length(product) / norm_t;
  const double divisor = std::max(norm_s, eps);
  for (int64_t i = 0; i < s.rows; ++i) u[i] = A(t[i] / norm_t);
  for (int64_t j = 0; j < s.cols; ++j) v[j] = A(product[j] / norm_t / divisor);
  return norm_s * norm_s / divisor;
}

template <typename A, typename Out>
void scale(const A* w, A sigma, Out* out, int64_t total) {
  in_chunks(total, [&](int64_t at, int64_t n) {
    A buffer[Chunk];
    divide(w + at, sigma, write_lines(out + at, n, 1, n, buffer).at, n);
    round_lines(out + at, n, 1, n, buffer);
  });
}

template <typename A, typename In>
void backward(const In* grad, const A* w, const A* u, const A* v, A sigma, const SnSizes& s, A* dw) {
  const int64_t total = s.rows * s.cols, chunks = (total + Chunk - 1) / Chunk;
  std::vector<double> partial(chunks);
  in_chunks(total, [&](int64_t at, int64_t n) {
    A buffer[Chunk];
    partial[at / Chunk] = dot(read_lines(grad + at, n, 1, n, buffer).at, w + at, n);
  });
  double inner = 0;
  for (double p : partial) inner += p;
  const double factor = inner / (double(sigma) * double(sigma));
  const int64_t grain = std::max<int64_t>(1, 32768 / s.cols);
  torch::stable::parallel_for(0, s.rows, grain, [&](int64_t begin, int64_t end) {
    A buffer[Chunk];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < s.cols; j += Chunk) {
        const int64_t n = std::min(Chunk, s.cols - j), at = i * s.cols + j;
        rank_one(read_lines(grad + at, n, 1, n, buffer).at, sigma, v + j, A(factor * u[i]), dw + at, n);
      }
    }
  });
}
}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> spectral_norm_cpu(
    std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs, double eps, bool update,
    std::optional<ScalarType> out_dtype) {
  check_spectral_norm(weights, us, vs);
  const ScalarType dtype = weights[0].scalar_type(), out = sn_out_dtype(weights, out_dtype);
  std::vector<Tensor> scaled, new_us, new_vs;
  Tensor sigmas = new_like(weights[0], {int64_t(weights.size())}, dtype);
  auto layer = [&](size_t i, auto storage) {
    using Out = decltype(storage);
    using A = wide_t<Out>;  // of the weights, as sn_out_dtype checked
    const Tensor w = dense(weights[i]);
    const SnSizes s = sn_sizes(w);
    Tensor y = empty_like(w, out);
    Tensor u = torch::stable::clone(as(us[i], dtype)), v = torch::stable::clone(as(vs[i], dtype));
    const A* w_data = w.const_data_ptr<A>();
    std::vector<A> v_data(s.cols);  // in memory order
    A* v_logical = v.mutable_data_ptr<A>();
    columns(s, [&](int64_t column, int64_t place) { v_data[place] = v_logical[column]; });
    A sigma = A(iterate(w_data, s, u.mutable_data_ptr<A>(), v_data.data(), eps, update));
    columns(s, [&](int64_t column, int64_t place) { v_logical[column] = v_data[place]; });
    scale(w_data, sigma, static_cast<Out*>(y.mutable_data_ptr()), s.rows * s.cols);
    sigmas.mutable_data_ptr<A>()[i] = sigma;
    scaled.push_back(y), new_us.push_back(u), new_vs.push_back(v);
  };
  for (size_t i = 0; i < weights.size(); ++i) dispatch(out, [&](auto storage) { layer(i, storage); });
  return {scaled, new_us, new_vs, sigmas};
}

std::vector<Tensor> spectral_norm_backward_cpu(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                               std::vector<Tensor> us, std::vector<Tensor> vs,
                                               const Tensor& sigmas) {
  check_spectral_norm_backward(grads, weights, us, vs, sigmas);
  const ScalarType dtype = weights[0].scalar_type();
  std::vector<Tensor> results;
  auto layer = [&](size_t i, auto storage) {
    using In = decltype(storage);
    using A = wide_t<In>;
    const Tensor w = dense(weights[i]), grad = in_layout_of(grads[i], w);
    const SnSizes s = sn_sizes(w);
    Tensor dw = torch::stable::empty_like(w), u = as(us[i], dtype), v = as(vs[i], dtype);
    std::vector<A> v_data(s.cols);
    const A* v_logical = v.const_data_ptr<A>();
    columns(s, [&](int64_t column, int64_t place) { v_data[place] = v_logical[column]; });
    backward(static_cast<const In*>(grad.const_data_ptr()), w.const_data_ptr<A>(), u.const_data_ptr<A>(),
             v_data.data(), sigmas.const_data_ptr<A>()[i], s, dw.mutable_data_ptr<A>());
    results.push_back(dw);
  };
  const ScalarType given = grads[0].scalar_type();
  for (size_t i = 0; i < weights.size(); ++i) dispatch(given, [&](auto storage) { layer(i, storage); });
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(dcgan, CPU, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm_cpu));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward_cpu));
}
}  // namespace dcgan
