// BatchNorm + LeakyReLU on the CPU, forward and backward.
//
//   forward    mean = sum(x) / M, var = sum((x - mean)^2) / M        per channel, over M values of a group
//              s = weight / sqrt(var + eps)
//              z = (x - mean) s + bias,  y = z > 0 ? z : slope z
//   backward   dz = z > 0 ? dy : slope dy                            z anew from x: no mask, y is not saved
//              dbias = sum(dz),  dweight = sum(dz (x - mean)) invstd
//              dx = s (dz - dbias / M - (x - mean) invstd dweight / M)
//              in eval mode mean and var are constants: dx = s dz
//   layout     x is (outer, channels, inner): see BnSizes. Memory is cut into blocks of whole channels, and
//              each block into pieces of at most `Width` adjacent values, the columns; the sums run down the
//              columns and a channel's columns are added last. So rows of 16 values (4x4 pictures) become
//              vectors as well as long ones, and one code serves NCHW, channels_last and (N, C).
//   precision  statistics and sums in fp64 (of x - x0, x0 a value of the channel: no cancellation), to which
//              bf16 and fp16 come as fp32 sums of at most four values; the rest in fp32, fp64 for double;
//              rounded once. The order of additions depends on shapes only: any number of threads gives the
//              same bits. mean is kept in fp32, so that backward sees the same z.
//   bytes      per element of 4 (2) bytes: forward reads x twice and writes y, 12 (6); backward reads x and
//              dy twice and writes dx, 20 (10). In NCHW the second reading comes from the L2 cache.
//   sources    Ioffe, Szegedy 2015 (arXiv 1502.03167); for behaviour PyTorch's batch_norm_kernel.cpp
#include <algorithm>
#include <cmath>
#include <limits>

#include "columns.h"

namespace dcgan {
namespace {
template <typename T>  // halfs have few digits: four of them may be added in fp32
using Group = std::conditional_t<sizeof(T) == 2, float, double>;

// ------------------------------------------------------------------------ loops over R lines of n columns
template <typename A>
inline A normalized(A centered, A scale, A bias) {
  return centered * scale + bias;  // one expression for both directions, so that both see one sign
}
template <typename A>  // dz
inline A passed_back(A dy, A centered, A scale, A bias, A slope) {
  A low = dy * slope;
  return normalized(centered, scale, bias) > 0 ? dy : low;
}
// S: in which R values are added before they go to the fp64 sum of their column
// (x_step: from one line of x to the next; ahead: from there to the lines asked for meanwhile, see vectors.h)
template <int R, typename S, typename A>
DCGAN_CLONES void add_moments(const A* __restrict x, int64_t x_step, const A* __restrict shift,
                              double* __restrict sum, double* __restrict square, int64_t n, int64_t ahead) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = ahead ? std::min(from + Stretch, n) : n;
    prefetch_lines<0, R>(x + from, x_step, ahead);
    for (int64_t j = from; j < to; ++j) {
      S s = 0, q = 0;
      for (int r = 0; r < R; ++r) {
        S d = S(x[r * x_step + j]) - S(shift[j]);
        s += d, q += d * d;
      }
      sum[j] += double(s), square[j] += double(q);
    }
  }
}
template <int R, typename A>
DCGAN_CLONES void activate(const A* __restrict x, int64_t x_step, const A* __restrict mean,
                           const A* __restrict scale, const A* __restrict bias, A slope, A* __restrict y,
                           int64_t y_step, int64_t n, int64_t ahead) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = ahead ? std::min(from + Stretch, n) : n;
    prefetch_lines<1, R>(y + from, y_step, ahead);
    for (int64_t j = from; j < to; ++j) {
      for (int r = 0; r < R; ++r) {
        A z = normalized(x[r * x_step + j] - mean[j], scale[j], bias[j]), low = z * slope;
        y[r * y_step + j] = z > 0 ? z : low;
      }
    }
  }
}
template <int R, typename S, typename A>
DCGAN_CLONES void add_gradients(const A* __restrict dy, int64_t dy_step, const A* __restrict x,
                                int64_t x_step, const A* __restrict mean, const A* __restrict scale,
                                const A* __restrict bias, A slope, double* __restrict sum,
                                double* __restrict product, int64_t n, int64_t ahead) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = ahead ? std::min(from + Stretch, n) : n;
    prefetch_lines<0, R>(dy + from, dy_step, ahead);
    prefetch_lines<0, R>(x + from, x_step, ahead);
    for (int64_t j = from; j < to; ++j) {
      S s = 0, q = 0;
      for (int r = 0; r < R; ++r) {
        A centered = x[r * x_step + j] - mean[j];
        A dz = passed_back(dy[r * dy_step + j], centered, scale[j], bias[j], slope);
        s += S(dz), q += S(dz) * S(centered);
      }
      sum[j] += double(s), product[j] += double(q);
    }
  }
}
template <int R, bool Training, typename A>  // dx = scale dz + (x - mean) p + q, in eval mode scale dz
DCGAN_CLONES void gradient(const A* __restrict dy, int64_t dy_step, const A* __restrict x, int64_t x_step,
                           const A* __restrict mean, const A* __restrict scale, const A* __restrict bias,
                           const A* __restrict p, const A* __restrict q, A slope, A* __restrict dx,
                           int64_t dx_step, int64_t n, int64_t ahead) {
  for (int64_t from = 0, to; from < n; from = to) {
    to = ahead ? std::min(from + Stretch, n) : n;
    prefetch_lines<1, R>(dx + from, dx_step, ahead);
    for (int64_t j = from; j < to; ++j) {
      for (int r = 0; r < R; ++r) {
        A centered = x[r * x_step + j] - mean[j];
        A dz = passed_back(dy[r * dy_step + j], centered, scale[j], bias[j], slope);
        dx[r * dx_step + j] = dz * scale[j] + (Training ? centered * p[j] + q[j] : A(0));  // eval: p = 0, but x may be inf
      }
    }
  }
}

// ------------------------------------------------------------------------------------ the two directions
// running_*: read in eval mode, changed in training
template <typename T, typename A = wide_t<T>>
void forward(const Tensor& x_tensor, const Tensor& y_tensor, const BnSizes& sizes,
             const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& means,
             const Tensor& invstds, const OptionalTensor& running_mean, const OptionalTensor& running_var,
             bool training, double momentum, double eps, double slope) {
  const Cut cut(sizes);
  const A *w = read_only<A>(weight), *b = read_only<A>(bias);
  A *r_mean = writable<A>(running_mean), *r_var = writable<A>(running_var);
  const double M = double(sizes.count);
  for (int64_t g = 0; g < sizes.groups; ++g) {
    int64_t start = g * cut.rows * cut.channels * cut.inner;
    const T* x = static_cast<const T*>(x_tensor.const_data_ptr()) + start;
    T* y = static_cast<T*>(y_tensor.mutable_data_ptr()) + start;
    A* mean = means.mutable_data_ptr<A>() + g * cut.channels;
    A* invstd = invstds.mutable_data_ptr<A>() + g * cut.channels;
    Partials partials(cut);
    auto typical = [&](int64_t channel) {  // the median of three values, 0 if infinite
      const T* first = x + channel * cut.inner;
      const int64_t pitch = cut.channels * cut.inner;
      A a = widen(first[0]), b = widen(first[cut.rows / 2 * pitch]);
      A c = widen(first[(cut.rows - 1) * pitch + cut.inner - 1]);
      A median = std::max(std::min(a, b), std::min(std::max(a, b), c));
      return std::isfinite(median) ? median : A(0);
    };
    auto sums = [&](int64_t block, int64_t chunk) {
      if (!training) return;
      A in[4 * Width], shift[Width];
      Sums sums;
      cut.spread(block, shift, [&](int64_t c) { return typical(cut.first_channel(block) + c); });
      cut.pieces(block, chunk, [&](auto R, int64_t at, int64_t step, int64_t n, int64_t ahead) {
        auto [xs, x_step, next] = read_lines(x + at, step, R, n, in, ahead);
        add_moments<R, Group<T>>(xs, x_step, shift, sums.a, sums.b, n, next);
      });
      partials.put(block, chunk, sums);
    };
    auto finish = [&](int64_t block) {
      int64_t begin = cut.first_channel(block), end = begin + cut.channels_of(block);
      for (int64_t c = begin; c < end; ++c) {
        double m = training ? 0 : r_mean[c], var = training ? 0 : r_var[c];
        if (training) {
          auto [sum, square] = partials.total(c);
          double d = sum / M;
          m = typical(c) + d;
          var = square / M - d * d;
          var = var < 0 ? 0 : var;
          if (r_mean) {
            r_mean[c] = A(momentum * m + (1 - momentum) * r_mean[c]);
            r_var[c] = A(momentum * var * (M / (M - 1)) + (1 - momentum) * r_var[c]);
          }
        }
        mean[c] = A(m);
        invstd[c] = A(1 / std::sqrt(var + eps));
      }
    };
    auto apply = [&](int64_t block, int64_t chunk) {
      A in[4 * Width], out[4 * Width];
      Constants<A> k(cut, block, mean, invstd, w, b);
      cut.pieces(block, chunk, [&](auto R, int64_t at, int64_t step, int64_t n, int64_t ahead) {
        auto [xs, x_step, next] = read_lines(x + at, step, R, n, in, ahead);
        auto [ys, y_step, y_next] = write_lines(y + at, step, R, n, out, ahead);
        activate<R>(xs, x_step, k.mean, k.scale, k.bias, A(slope), ys, y_step, n, y_next);
        round_lines(y + at, step, R, n, out);
      });
    };
    cut.run(sums, finish, apply);
  }
}

template <typename T, typename A = wide_t<T>>
void backward(const Tensor& dy_tensor, const Tensor& x_tensor, const Tensor& dx_tensor, const BnSizes& sizes,
              const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& means,
              const Tensor& invstds, const Tensor& dweights, const Tensor& dbiases, bool training,
              double slope) {
  const Cut cut(sizes);
  const A *w = read_only<A>(weight), *b = read_only<A>(bias);
  A *dweight = dweights.mutable_data_ptr<A>(), *dbias = dbiases.mutable_data_ptr<A>();
  const double M = double(sizes.count);
  std::vector<A> p(cut.channels), q(cut.channels);
  for (int64_t g = 0; g < sizes.groups; ++g) {
    int64_t start = g * cut.rows * cut.channels * cut.inner;
    const T* dy = static_cast<const T*>(dy_tensor.const_data_ptr()) + start;
    const T* x = static_cast<const T*>(x_tensor.const_data_ptr()) + start;
    T* dx = static_cast<T*>(dx_tensor.mutable_data_ptr()) + start;
    const A* mean = means.const_data_ptr<A>() + g * cut.channels;
    const A* invstd = invstds.const_data_ptr<A>() + g * cut.channels;
    Partials partials(cut);
    auto sums = [&](int64_t block, int64_t chunk) {
      A in[4 * Width], grad[4 * Width];
      Sums sums;
      Constants<A> k(cut, block, mean, invstd, w, b);
      cut.pieces(block, chunk, [&](auto R, int64_t at, int64_t step, int64_t n, int64_t ahead) {
        auto [dys, dy_step, dy_next] = read_lines(dy + at, step, R, n, grad, ahead);
        auto [xs, x_step, next] = read_lines(x + at, step, R, n, in, ahead);
        add_gradients<R, Group<T>>(dys, dy_step, xs, x_step, k.mean, k.scale, k.bias, A(slope), sums.a,
                                   sums.b, n, next);
      });
      partials.put(block, chunk, sums);
    };
    auto finish = [&](int64_t block) {
      int64_t begin = cut.first_channel(block), end = begin + cut.channels_of(block);
      for (int64_t c = begin; c < end; ++c) {
        auto [sum, product] = partials.total(c);
        double s = (w ? double(w[c]) : 1.0) * invstd[c];
        p[c] = training ? A(-s * product * invstd[c] * invstd[c] / M) : A(0);
        q[c] = training ? A(-s * sum / M) : A(0);
        dweight[c] += A(product * invstd[c]);
        dbias[c] += A(sum);
      }
    };
    auto apply = [&](int64_t block, int64_t chunk) {
      A in[4 * Width], grad[4 * Width], out[4 * Width], ps[Width], qs[Width];
      Constants<A> k(cut, block, mean, invstd, w, b);
      cut.spread(block, ps, [&](int64_t c) { return p[cut.first_channel(block) + c]; });
      cut.spread(block, qs, [&](int64_t c) { return q[cut.first_channel(block) + c]; });
      cut.pieces(block, chunk, [&](auto R, int64_t at, int64_t step, int64_t n, int64_t ahead) {
        auto [dys, dy_step, dy_next] = read_lines(dy + at, step, R, n, grad, ahead);
        auto [xs, x_step, next] = read_lines(x + at, step, R, n, in, ahead);
        auto [dxs, dx_step, dx_next] = write_lines(dx + at, step, R, n, out, ahead);
        auto write = training ? gradient<R, true, A> : gradient<R, false, A>;
        write(dys, dy_step, xs, x_step, k.mean, k.scale, k.bias, ps, qs, A(slope), dxs, dx_step, n, dx_next);
        round_lines(dx + at, step, R, n, out);
      });
    };
    cut.run(sums, finish, apply);
  }
}
}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_leaky_relu_cpu(
    const Tensor& x_any, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
    double eps, double slope, int64_t groups) {
  check_bn_leaky_relu(x_any, weight, bias, running_mean, running_var, training, groups);
  const Tensor x = dense(x_any);
  const ScalarType acc = wide(x.scalar_type());
  const BnSizes sizes = bn_sizes(x, training ? groups : 1);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_like(x, {sizes.groups, sizes.channels}, acc), invstd = torch::stable::empty_like(mean);
  OptionalTensor new_mean = as(running_mean, acc), new_var = as(running_var, acc);
  if (training && new_mean) {
    new_mean = torch::stable::clone(*new_mean);
    new_var = torch::stable::clone(*new_var);
  }
  if (x.numel() > 0) {
    dispatch(x.scalar_type(), [&](auto t) {
      forward<decltype(t)>(x, y, sizes, as(weight, acc), as(bias, acc), mean, invstd, new_mean, new_var,
                           training, momentum, eps, slope);
    });
  } else {
    torch::stable::zero_(mean), torch::stable::zero_(invstd);
  }
  if (!training || !new_mean) {
    Tensor none = new_like(x, {0}, running_mean ? running_mean->scalar_type() : acc);
    return {y, mean, invstd, none, torch::stable::empty_like(none)};
  }
  return {y, mean, invstd, as(*new_mean, running_mean->scalar_type()),
          as(*new_var, running_var->scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> bn_leaky_relu_backward_cpu(
    const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, double slope, int64_t groups) {
  check_bn_leaky_relu_backward(dy_any, x_any, weight, bias, mean, invstd, training, groups);
  const Tensor x = dense(x_any), dy = in_layout_of(dy_any, x);
  const ScalarType acc = wide(x.scalar_type());
  const BnSizes sizes = bn_sizes(x, training ? groups : 1);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_zeros(x, {sizes.channels}, acc);
  Tensor dbias = torch::stable::new_zeros(x, {sizes.channels}, acc);
  if (x.numel() > 0) {
    dispatch(x.scalar_type(), [&](auto t) {
      backward<decltype(t)>(dy, x, dx, sizes, as(weight, acc), as(bias, acc), mean, invstd, dweight, dbias,
                            training, slope);
    });
  }
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(dcgan, CPU, m) {
  m.impl("bn_leaky_relu", TORCH_BOX(&bn_leaky_relu_cpu));
  m.impl("bn_leaky_relu_backward", TORCH_BOX(&bn_leaky_relu_backward_cpu));
}
}  // namespace dcgan
