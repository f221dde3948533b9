// The Python module of a library: importing it loads the kernels and registers them; its only content says
// what it was built from. build.py finds the same text in the file without loading it.
#define AS_TEXT_(...) #__VA_ARGS__  // a list of architectures has commas
#define AS_TEXT(...) AS_TEXT_(__VA_ARGS__)

[[gnu::used]] static const char facts[] =  // used: whole in the file, though only its end is used below
    "dcgan-ops-facts {\"sources\": \"" AS_TEXT(DCGAN_SOURCES) "\", \"compiler\": \"" __VERSION__
    "\", \"cuda\": \"" AS_TEXT(DCGAN_CUDA) "\", \"architectures\": \"" AS_TEXT(DCGAN_ARCHITECTURES)
    "\", \"torch_target\": \"" AS_TEXT(TORCH_TARGET_VERSION) "\", \"built_with_torch\": \"" AS_TEXT(DCGAN_TORCH)
    "\"}";

#undef TORCH_TARGET_VERSION  // with it, the copy of pybind11 that comes with torch 2.11 refuses to be included
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Fused ops of DCGAN: see dcgan_ops.";
  m.attr("facts") = facts + sizeof("dcgan-ops-facts");
}
