// A libcuda.so.1 that computes nothing and writes down what it is asked to launch.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "kinds.h"  // generated: kinds(kernel) -> a letter for each argument: p pointer, i int32, f float

namespace {

struct Function {
  char const* image;
  std::string entry;
  int shared = -1;
};

int g_architecture = 80, g_refused = 0;
constexpr int kInvalidImage = 200, kNotFound = 500, kInvalidValue = 1;

void print(char kind, void const* argument) {
  int64_t pointer = 0;
  int32_t integer = 0;
  float number = 0;
  if (kind == 'p') std::memcpy(&pointer, argument, sizeof pointer), std::printf(" %lld", static_cast<long long>(pointer));
  if (kind == 'i') std::memcpy(&integer, argument, sizeof integer), std::printf(" %d", integer);
  if (kind == 'f') std::memcpy(&number, argument, sizeof number), std::printf(" %.9g", number);
}

}  // namespace

extern "C" {

void fake_gpu(int architecture, int refused) { g_architecture = architecture, g_refused = refused; }

int cuCtxGetCurrent(void** context) { return *context = &g_architecture, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != 75 && attribute != 76) return kInvalidValue;
  *value = attribute == 75 ? g_architecture / 10 : g_architecture % 10;
  return 0;
}

int cuModuleLoadData(void** module, void const* image) {
  *module = const_cast<void*>(image);
  return g_refused || std::strncmp(static_cast<char const*>(image), "code of ", 8) != 0 ? kInvalidImage : 0;
}

int cuModuleGetFunction(void** function, void* module, char const* entry) {
  *function = new Function{static_cast<char const*>(module), entry};
  return kinds(entry) == nullptr ? kNotFound : 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  static_cast<Function*>(function)->shared = value;
  return attribute == 8 ? 0 : kInvalidValue;
}

int cuLaunchKernel(void* made, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  Function const& function = *static_cast<Function*>(made);
  if (by != 1 || bz != 1 || extra != nullptr || static_cast<int>(shared) != function.shared) return kInvalidValue;
  std::printf("launch %s | %u %u %u %u %u %lld |", function.image, x, y, z, bx, shared, reinterpret_cast<long long>(stream));
  char const* kind = kinds(function.entry.c_str());
  for (; *kind != 0; ++kind, ++arguments) print(*kind, *arguments);
  for (int scratch = 0; scratch < 2; ++scratch) print('p', arguments[scratch]);
  std::printf("\n");
  return 0;
}

int cuGetErrorString(int code, char const** text) { return *text = code == kInvalidImage ? "invalid image" : "another error", 0; }

}  // extern "C"
