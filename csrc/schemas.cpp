// The four operators of the library `dcgan`, for every device; kernels are registered where they are written.
// All are functional: they return new buffers and change none, so that torch.compile, CUDA graphs and a
// skipped step need no special case. __init__.py commits buffers, and adds autograd and fake kernels.
#include "checks.h"

STABLE_TORCH_LIBRARY(dcgan, m) {
  // mean, invstd: (groups, C) in fp32 (fp64 for double); in eval (1, C), from the running statistics.
  // new_running_*: what the running statistics become; empty (0,) in eval or where there are none.
  m.def(
      "bn_leaky_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "bool training, float momentum, float eps, float slope, int groups) -> "
      "(Tensor y, Tensor mean, Tensor invstd, Tensor new_running_mean, Tensor new_running_var)");
  // dweight, dbias: (C,) in fp32 (fp64 for double)
  m.def(
      "bn_leaky_relu_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "bool training, float slope, int groups) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  // weights: (out, in, ...); us: (out,); vs: (in * ...,) in logical order; sigmas: (number of weights,)
  m.def(
      "spectral_norm(Tensor[] weights, Tensor[] us, Tensor[] vs, float eps, bool update, "
      "ScalarType? out_dtype) -> (Tensor[] weights_sn, Tensor[] new_us, Tensor[] new_vs, Tensor sigmas)");
  // us, vs, sigmas: of the same forward; the gradients in out_dtype, the results like the weights
  m.def(
      "spectral_norm_backward(Tensor[] grads, Tensor[] weights, Tensor[] us, Tensor[] vs, Tensor sigmas) -> "
      "Tensor[]");
}
