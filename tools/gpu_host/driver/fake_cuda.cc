// A libcuda.so.1 that computes nothing and writes down what it is asked to launch. Memory is real, but its addresses are
// not: the allocations since fake_gpu are at 4096, 8192, and so on, and are copied as wholes.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "kinds.h"  // generated: kinds(kernel) -> a letter for each argument: p pointer, i int32, f float

namespace {

struct Function {
  char const* image;
  std::string entry;
  int shared = -1;
};

int g_architecture = 80, g_refused = 0;
std::map<uint64_t, std::string> g_memory;
constexpr int kInvalidImage = 200, kNotFound = 500, kInvalidValue = 1;
constexpr uint64_t kPage = 4096;
constexpr size_t kMostBytes = size_t{1} << 26;

void print(char kind, void const* argument) {
  int64_t pointer = 0;
  int32_t integer = 0;
  float number = 0;
  if (kind == 'p')
    std::memcpy(&pointer, argument, sizeof pointer), std::printf(" %lld", static_cast<long long>(pointer));
  if (kind == 'i') std::memcpy(&integer, argument, sizeof integer), std::printf(" %d", integer);
  if (kind == 'f') std::memcpy(&number, argument, sizeof number), std::printf(" %.9g", number);
}

// The bytes of an allocation, where it has as many; nullptr otherwise.
char* held(uint64_t address, size_t bytes) {
  auto const found = g_memory.find(address);
  return found == g_memory.end() || found->second.size() < bytes ? nullptr : found->second.data();
}

}  // namespace

extern "C" {

void fake_gpu(int architecture, int refused) {
  g_architecture = architecture, g_refused = refused;
  g_memory.clear();
}

int cuInit(unsigned flags) { return flags == 0 ? 0 : kInvalidValue; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &g_architecture, 0; }
int cuCtxSetCurrent(void* context) { return context == &g_architecture ? 0 : kInvalidValue; }
int cuCtxGetCurrent(void** context) { return *context = &g_architecture, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxSynchronize() { return 0; }
int cuStreamCreate(void** stream, unsigned) { return *stream = reinterpret_cast<void*>(77), 0; }

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  if (bytes > kMostBytes) bytes = kMostBytes;  // nothing reads as much
  *address = kPage * (g_memory.size() + 1);
  g_memory[*address] = std::string(bytes, '\0');
  return 0;
}

int cuMemFree_v2(uint64_t) { return 0; }

int cuMemsetD8_v2(uint64_t address, unsigned char byte, size_t bytes) {
  char* const memory = held(address, bytes);
  if (memory != nullptr) std::memset(memory, byte, bytes);
  return memory == nullptr ? kInvalidValue : 0;
}

int cuMemcpyHtoD_v2(uint64_t address, void const* from, size_t bytes) {
  char* const memory = held(address, bytes);
  if (memory != nullptr) std::memcpy(memory, from, bytes);
  return memory == nullptr ? kInvalidValue : 0;
}

int cuMemcpyDtoH_v2(void* to, uint64_t address, size_t bytes) {
  char const* const memory = held(address, bytes);
  if (memory != nullptr) std::memcpy(to, memory, bytes);
  return memory == nullptr ? kInvalidValue : 0;
}

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

int cuLaunchKernel(void* made, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  Function const& function = *static_cast<Function*>(made);
  if (by != 1 || bz != 1 || extra != nullptr || static_cast<int>(shared) != function.shared) return kInvalidValue;
  std::printf("launch %s | %u %u %u %u %u %lld |", function.image, x, y, z, bx, shared,
              reinterpret_cast<long long>(stream));
  char const* kind = kinds(function.entry.c_str());
  for (; *kind != 0; ++kind, ++arguments) print(*kind, *arguments);
  for (int scratch = 0; scratch < 2; ++scratch) print('p', arguments[scratch]);
  std::printf("\n");
  return 0;
}

int cuGetErrorString(int code, char const** text) {
  return *text = code == kInvalidImage ? "invalid image" : "another error", 0;
}

}  // extern "C"
