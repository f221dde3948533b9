// BatchNorm + LeakyReLU on CUDA, in training and in eval, forward and backward.
//
// forward    mean, var over the `count` values of a channel in a group;  invstd = 1 / sqrt(var + eps)
//            z = (x - mean) * scale + bias  with  scale = weight * invstd;   y = z > 0 ? z : z * slope
// backward   dz = z > 0 ? dy : dy * slope, the sign of z computed again from x: no mask, y is not saved
//            dbias = sum dz;   dweight = invstd * sum dz * (x - mean)
//            dx = scale * (dz - sum dz / count - (x - mean) * invstd^2 * sum dz * (x - mean) / count)
//            for mean and var depend on x, too; in eval they do not, and dx = scale * dz
// layout     a block owns a tile of channels and a slab of rows of one group. channels_last and (N, C): 32
//            channels, and a row is one pixel, V channels a thread. NCHW: one channel, and a row is V
//            neighbours in one picture. V * sizeof(T) = 16 bytes where sizes and pointers allow it, or V = 1.
// launches   two each way (eval forward: one). The first reduces a slab to one partial result per channel.
//            In the second every block merges the partials of its own channels, all in the same order, then
//            goes over its slab; slab 0 of group 0 also writes the running statistics, dweight and dbias.
// bytes      per element, read and written: forward 12 in fp32, 6 in bf16; backward 20 and 10
// precision  fp32 (fp64 for double), rounded once at the end. Moments are those of x - x0, where x0 is a
//            typical value of the channel, of batches of rows about their own mean, merged pairwise: there is
//            no E[x^2] - E[x]^2, and neither a large mean nor an outlier spoils var (mean itself is kept in fp32)
// sources    Ioffe and Szegedy 2015 (BatchNorm and its gradient); Chan, Golub, LeVeque 1983 (merging);
//            Rota Bulo et al. 2018 (InPlace-ABN: fuse with the activation)
#include "bn_tiles.cuh"

namespace dcgan {
namespace {

// ---------------------------------------------------------------------------------------------- forward
// What the kernels of a pass get beside x; Affine is what they need of it for one channel.
template <typename T>
struct Forward {
  Param<T> weight, bias, running_mean, running_var, new_running_mean, new_running_var;
  wide_t<T>*mean, *invstd, momentum, eps, slope;
  bool training;
};

template <typename T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    bn_moments(Split s, const T* __restrict__ x, Moments<wide_t<T>>* __restrict__ partial) {
  Thread<V, kLast> me(s);
  Moments<wide_t<T>> mine[V] = {};
  Vector<wide_t<T>, V> x0{};
  if (me.left > 0) {
    const auto own = typical<kLast ? V : 1>(s, x, me.group, me.channel);
    for (int e = 0; e < V; ++e) x0.at[e] = own.at[kLast ? e : 0];
  }
  me.template each<4>([&](const int64_t(&at)[4], int valid) {
    Vector<T, V> rows[4];
    load_batch(x, at, valid, rows);
    if (valid == 4) return add_rows<4>(mine, rows, x0);
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (i < valid) add_rows<1>(mine, rows + i, x0);
  });
  const auto merged = merge_block<V, kLast>(mine);
  if (me.leads(s)) partial[s.place(me.group, me.slab, me.led_channel())] = merged;
}

template <typename T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    bn_activate(Split s, const T* __restrict__ x, Forward<T> p,
                const Moments<wide_t<T>>* __restrict__ partial, T* __restrict__ y) {
  using A = wide_t<T>;
  __shared__ Affine<A> tile[kTile];
  Thread<V, kLast> me(s);
  const int64_t c = me.led_channel();
  const bool leads = me.leads(s), first = me.slab == 0 && me.group == 0;
  A running_mean = leads ? p.running_mean.get(c, 0) : 0, running_var = leads ? p.running_var.get(c, 0) : 0;

  // the first block of a tile goes over all groups, for the running statistics; the others merge their own
  for (int group = first ? 0 : me.group; group < (first ? s.groups : me.group + 1); ++group) {
    A mean = running_mean, var = running_var;
    if (p.training) {
      const auto moments = merge_slabs<kLast>(partial, s, me.tile, group);
      mean = moments.mean + (leads ? typical<1>(s, x, group, c).at[0] : 0), var = moments.m2 / s.count;
      running_mean += p.momentum * (mean - running_mean);
      running_var += p.momentum * (moments.m2 / (s.count - 1) - running_var);
    }
    if (!leads || group != me.group) continue;
    const A invstd = 1 / sqrt(var + p.eps);
    tile[me.lane] = {mean, p.weight.get(c, 1) * invstd, p.bias.get(c, 0)};
    if (me.slab == 0) p.mean[group * s.channels + c] = mean, p.invstd[group * s.channels + c] = invstd;
  }
  if (leads && first && p.new_running_mean.data) {
    p.new_running_mean.set(c, running_mean);
    p.new_running_var.set(c, running_var);
  }
  __syncthreads();

  Affine<A> z[V];
  for (int e = 0; e < V; ++e) z[e] = tile[me.place_in_tile(e)];
  me.template each<4>([&](const int64_t(&at)[4], int valid) {
    Vector<T, V> rows[4];
    load_batch(x, at, valid, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= valid) break;
      for (int e = 0; e < V; ++e) {
        const A ze = z[e](A(rows[i].at[e]) - z[e].mean);
        rows[i].at[e] = T(ze > 0 ? ze : ze * p.slope);
      }
      store(y + at[i], rows[i]);
    }
  });
}

// ---------------------------------------------------------------------------------------------- backward
template <typename T>
struct Backward {
  Param<T> weight, bias;
  const wide_t<T>*mean, *invstd;
  wide_t<T>*dweight, *dbias, slope;
  bool training;

  __device__ Affine<wide_t<T>> affine(const Split& s, int64_t group, int64_t c) const {
    const int64_t at = group * s.channels + c;
    return {mean[at], weight.get(c, 1) * invstd[at], bias.get(c, 0)};
  }
};

template <typename T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    bn_gradient_sums(Split s, const T* __restrict__ dy, const T* __restrict__ x, Backward<T> p,
                     Sums<wide_t<T>>* __restrict__ partial) {
  using A = wide_t<T>;
  __shared__ Affine<A> tile[kTile];
  Thread<V, kLast> me(s);
  if (me.leads(s)) tile[me.lane] = p.affine(s, me.group, me.led_channel());
  __syncthreads();

  Affine<A> z[V];
  Sums<A> mine[V] = {};
  for (int e = 0; e < V; ++e) z[e] = tile[me.place_in_tile(e)];
  me.template each<2>([&](const int64_t(&at)[2], int valid) {
    Vector<T, V> xs[2], dys[2];
    load_batch(x, at, valid, xs);
    load_batch(dy, at, valid, dys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= valid) break;
      for (int e = 0; e < V; ++e) {
        const A distance = A(xs[i].at[e]) - z[e].mean, g = A(dys[i].at[e]);
        const A dz = z[e](distance) > 0 ? g : g * p.slope;
        mine[e].dz += dz;
        mine[e].dz_x += dz * distance;
      }
    }
  });
  const auto merged = merge_block<V, kLast>(mine);
  if (me.leads(s)) partial[s.place(me.group, me.slab, me.led_channel())] = merged;
}

template <typename T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    bn_gradient(Split s, const T* __restrict__ dy, const T* __restrict__ x, Backward<T> p,
                const Sums<wide_t<T>>* __restrict__ partial, T* __restrict__ dx) {
  using A = wide_t<T>;
  struct Terms {  // dx = z.scale * dz - constant - slant * (x - mean)
    Affine<A> z;
    A constant, slant;
  };
  __shared__ Terms tile[kTile];
  Thread<V, kLast> me(s);
  const int64_t c = me.led_channel();
  const bool leads = me.leads(s), first = me.slab == 0 && me.group == 0;
  A dweight = 0, dbias = 0;

  for (int group = first ? 0 : me.group; group < (first ? s.groups : me.group + 1); ++group) {
    const auto sums = merge_slabs<kLast>(partial, s, me.tile, group);
    if (!leads) continue;
    const A invstd = p.invstd[group * s.channels + c];
    dweight += invstd * sums.dz_x;
    dbias += sums.dz;
    if (group != me.group) continue;
    const auto z = p.affine(s, group, c);
    tile[me.lane] = {z, 0, 0};
    if (!p.training) continue;  // mean and var are no functions of x
    tile[me.lane].constant = z.scale * (sums.dz / s.count);
    tile[me.lane].slant = z.scale * (invstd * (invstd * sums.dz_x / s.count));
  }
  if (leads && first) p.dweight[c] = dweight, p.dbias[c] = dbias;
  __syncthreads();

  Terms t[V];
  for (int e = 0; e < V; ++e) t[e] = tile[me.place_in_tile(e)];
  me.template each<2>([&](const int64_t(&at)[2], int valid) {
    Vector<T, V> xs[2], dys[2];
    load_batch(x, at, valid, xs);
    load_batch(dy, at, valid, dys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= valid) break;
      for (int e = 0; e < V; ++e) {
        const A distance = A(xs[i].at[e]) - t[e].z.mean, g = A(dys[i].at[e]);
        const A dz = t[e].z(distance) > 0 ? g : g * p.slope;
        const A steep = t[e].z.scale * dz;  // all there is in eval mode: 0 times an infinite distance is NaN
        xs[i].at[e] = T(p.training ? steep - t[e].constant - t[e].slant * distance : steep);
      }
      store(dx + at[i], xs[i]);
    }
  });
}

// ---------------------------------------------------------------------------------------------- launchers
template <typename T, int V, bool kLast>
void launch(const Tensor& x, const BnSizes& sizes, const Forward<T>& p, Tensor& y) {
  using P = Moments<wide_t<T>>;
  const Split s = split<T, V, kLast>(x, sizes);
  const int blocks = s.tiles * s.slabs * s.groups;
  const auto stream = current_stream(x);
  const auto storage = partials<P>(x, p.training ? s : Split{});
  const auto partial = static_cast<P*>(storage.mutable_data_ptr());
  const auto from = x.const_data_ptr<T>();
  const auto to = y.mutable_data_ptr<T>();
  if (p.training) bn_moments<T, V, kLast><<<blocks, kThreads, 0, stream>>>(s, from, partial);
  bn_activate<T, V, kLast><<<blocks, kThreads, 0, stream>>>(s, from, p, partial, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
template <typename T, int V, bool kLast>
void launch(const Tensor& dy, const Tensor& x, const BnSizes& sizes, const Backward<T>& p, Tensor& dx) {
  using P = Sums<wide_t<T>>;
  const Split s = split<T, V, kLast>(x, sizes);
  const int blocks = s.tiles * s.slabs * s.groups;
  const auto stream = current_stream(x);
  const auto storage = partials<P>(x, s);
  const auto partial = static_cast<P*>(storage.mutable_data_ptr());
  const auto from_dy = dy.const_data_ptr<T>(), from_x = x.const_data_ptr<T>();
  const auto to = dx.mutable_data_ptr<T>();
  bn_gradient_sums<T, V, kLast><<<blocks, kThreads, 0, stream>>>(s, from_dy, from_x, p, partial);
  bn_gradient<T, V, kLast><<<blocks, kThreads, 0, stream>>>(s, from_dy, from_x, p, partial, to);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_leaky_relu_cuda(
    const Tensor& x_any, const OptionalTensor& weight_any, const OptionalTensor& bias_any,
    const OptionalTensor& running_mean_any, const OptionalTensor& running_var_any, bool training,
    double momentum, double eps, double slope, int64_t groups) {
  check_bn_leaky_relu(x_any, weight_any, bias_any, running_mean_any, running_var_any, training, groups);
  torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = dense(x_any);
  const auto weight = in_row_order(weight_any), bias = in_row_order(bias_any);
  const auto running_mean = in_row_order(running_mean_any), running_var = in_row_order(running_var_any);
  const ScalarType type = x.scalar_type();
  const BnSizes sizes = bn_sizes(x, training ? groups : 1);

  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_like(x, {sizes.groups, sizes.channels}, wide(type));
  Tensor invstd = torch::stable::empty_like(mean);
  const bool updates = training && running_mean;
  auto updated = [&](const OptionalTensor& t) {
    return new_like(x, {updates ? sizes.channels : 0}, t ? t->scalar_type() : wide(type));
  };
  Tensor new_mean = updated(running_mean), new_var = updated(running_var);
  if (x.numel() == 0) {  // nothing to normalize, and the running statistics stay
    torch::stable::zero_(mean), torch::stable::zero_(invstd);
    if (updates) torch::stable::copy_(new_mean, *running_mean), torch::stable::copy_(new_var, *running_var);
    return {y, mean, invstd, new_mean, new_var};
  }
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    auto to = [&](const Tensor& t) { return updates ? param<T>(t, type) : Param<T>{}; };
    const Forward<T> p{
        param<T>(weight, type), param<T>(bias, type), param<T>(running_mean, type),
        param<T>(running_var, type), to(new_mean), to(new_var), mean.mutable_data_ptr<A>(),
        invstd.mutable_data_ptr<A>(), A(momentum), A(eps), A(slope), training};
    for_access<T>(sizes, aligned<T>(x), [&]<int V, bool kLast>() { launch<T, V, kLast>(x, sizes, p, y); });
  });
  return {y, mean, invstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> bn_leaky_relu_backward_cuda(
    const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& weight_any,
    const OptionalTensor& bias_any, const Tensor& mean, const Tensor& invstd, bool training, double slope,
    int64_t groups) {
  check_bn_leaky_relu_backward(dy_any, x_any, weight_any, bias_any, mean, invstd, training, groups);
  torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = dense(x_any), dy = in_layout_of(dy_any, x);
  const auto weight = in_row_order(weight_any), bias = in_row_order(bias_any);
  const ScalarType type = x.scalar_type();
  const BnSizes sizes = bn_sizes(x, training ? groups : 1);

  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = new_like(x, {sizes.channels}, wide(type)), dbias = torch::stable::empty_like(dweight);
  if (x.numel() == 0) {
    torch::stable::zero_(dweight), torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    const Backward<T> p{
        param<T>(weight, type), param<T>(bias, type), mean.const_data_ptr<A>(), invstd.const_data_ptr<A>(),
        dweight.mutable_data_ptr<A>(), dbias.mutable_data_ptr<A>(), A(slope), training};
    for_access<T>(sizes, aligned<T>(x) && aligned<T>(dy),
                  [&]<int V, bool kLast>() { launch<T, V, kLast>(dy, x, sizes, p, dx); });
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(dcgan, CUDA, m) {
  m.impl("bn_leaky_relu", TORCH_BOX(&bn_leaky_relu_cuda));
  m.impl("bn_leaky_relu_backward", TORCH_BOX(&bn_leaky_relu_backward_cuda));
}
}  // namespace
}  // namespace dcgan
