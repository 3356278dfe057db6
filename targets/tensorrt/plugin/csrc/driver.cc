#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

namespace h1 {
namespace {

constexpr char const* kDriver = "libcuda.so.1";
constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kMaxDynamicShared = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Driver {
  int (*get_context)(void**);
  int (*get_device)(int*);
  int (*get_attribute)(int*, int, int);
  int (*load_module)(void**, void const*);
  int (*get_function)(void**, void*, char const*);
  int (*set_attribute)(void*, int, int);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*error_string)(int, char const**);
  std::string missing;  // why there is no driver, or nothing

  Driver() {
    void* library = dlopen(kDriver, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = std::string("CUDA's driver cannot be loaded (") + dlerror() +
                "); engines run on machines with an NVIDIA GPU only";
      return;
    }
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuCtxGetDevice", get_device);
    find(library, "cuDeviceGetAttribute", get_attribute);
    find(library, "cuModuleLoadData", load_module);
    find(library, "cuModuleGetFunction", get_function);
    find(library, "cuFuncSetAttribute", set_attribute);
    find(library, "cuLaunchKernel", launch);
    find(library, "cuGetErrorString", error_string);
  }

  template <class Function>
  void find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
      missing = std::string(kDriver) + " lacks " + name + "; install a driver for CUDA 12 or later";
    }
  }

  // Whether a call of the driver went well; otherwise why not.
  bool ok(int code, std::string const& doing, std::string& why) const {
    if (code == 0) return true;
    char const* text = nullptr;
    error_string(code, &text);
    why = doing + ": CUDA error " + std::to_string(code) + " (" + (text == nullptr ? "unknown" : text) + ")";
    return false;
  }
};

Driver const& driver() {
  static Driver const the_driver;
  return the_driver;
}

std::string name(Cubin const& cubin) {
  return std::string(cubin.kernel) + " for sm_" + std::to_string(cubin.architecture);
}

// The function of a kernel in the current context, of which a process has one a GPU: modules are never unloaded.
void* function(Cubin const& cubin, std::string& why) {
  static std::mutex mutex;
  static std::map<std::pair<void*, Cubin const*>, void*> loaded;
  Driver const& cuda = driver();
  if (!cuda.missing.empty()) {
    why = cuda.missing;
    return nullptr;
  }
  void *context = nullptr, *module = nullptr, *made = nullptr;
  if (!cuda.ok(cuda.get_context(&context), "no current context", why)) return nullptr;
  std::lock_guard<std::mutex> const lock(mutex);
  auto const known = loaded.find({context, &cubin});
  if (known != loaded.end()) return known->second;
  if (!cuda.ok(cuda.load_module(&module, cubin.code), "loading " + name(cubin), why)) return nullptr;
  if (!cuda.ok(cuda.get_function(&made, module, cubin.entry), "finding " + name(cubin), why)) return nullptr;
  int const shared = static_cast<int>(cubin.shared);
  if (!cuda.ok(cuda.set_attribute(made, kMaxDynamicShared, shared), "shared memory of " + name(cubin), why)) {
    return nullptr;
  }
  loaded[{context, &cubin}] = made;
  return made;
}

}  // namespace

int32_t gpu_architecture(std::string& why) {
  Driver const& cuda = driver();
  int device = 0, major = 0, minor = 0;
  if (!cuda.missing.empty()) {
    why = cuda.missing;
    return 0;
  }
  bool const ok = cuda.ok(cuda.get_device(&device), "no current device", why) &&
                  cuda.ok(cuda.get_attribute(&major, kMajor, device), "compute capability", why) &&
                  cuda.ok(cuda.get_attribute(&minor, kMinor, device), "compute capability", why);
  return ok ? 10 * major + minor : 0;
}

bool make_grid(std::array<int64_t, 3> const& programs, Grid& grid, std::string& why) {
  for (size_t i = 0; i < grid.size(); ++i) {
    if (programs[i] < 1 || programs[i] > kMostGrid[i]) {
      why = "a grid of " + std::to_string(programs[0]) + " x " + std::to_string(programs[1]) + " x " +
            std::to_string(programs[2]) + " programs is more than a GPU takes; use a smaller batch or shorter calls";
      return false;
    }
    grid[i] = static_cast<uint32_t>(programs[i]);
  }
  return true;
}

bool load(Cubin const& cubin, std::string& why) { return function(cubin, why) != nullptr; }

bool launch(Cubin const& cubin, Grid const& grid, std::vector<void*> arguments, cudaStream_t stream, std::string& why) {
  void* const found = function(cubin, why);
  if (found == nullptr) return false;
  int const code = driver().launch(found, grid[0], grid[1], grid[2], cubin.threads, 1, 1, cubin.shared, stream,
                                   arguments.data(), nullptr);
  return driver().ok(code, "launching " + name(cubin), why);
}

}  // namespace h1
