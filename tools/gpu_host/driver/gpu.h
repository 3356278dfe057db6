// Memory of the GPU by CUDA's driver, found at run time. Without a driver, tensors have addresses and no memory.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

// An allocation whose first `bytes` are a tensor. Every byte starts as 0xff, which is NaN in each dtype of ours, and the
// bytes behind the tensor must stay so.
struct Buffer {
  static constexpr size_t kGuard = 256;
  uint64_t address = 0;
  size_t bytes = 0;
  std::string written;  // what was copied there; empty where nothing was

  void* at(size_t offset = 0) const { return reinterpret_cast<void*>(address + offset); }
};

class Gpu {
 public:
  // Takes the first GPU. A real driver's failure is printed, and then nothing can run.
  Gpu() : library_(dlopen("libcuda.so.1", RTLD_NOW)) {
    if (library_ == nullptr) return;
    void* context = nullptr;
    int device = 0;
    usable_ = good("cuInit", call<int(unsigned)>("cuInit")(0)) &&
              good("cuDeviceGet", call<int(int*, int)>("cuDeviceGet")(&device, 0)) &&
              good("cuDevicePrimaryCtxRetain", call<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device)) &&
              good("cuCtxSetCurrent", call<int(void*)>("cuCtxSetCurrent")(context)) &&
              good("cuStreamCreate", call<int(void**, unsigned)>("cuStreamCreate")(&stream_, 0));
  }

  bool failed() const { return library_ != nullptr && !usable_; }
  void* stream() const { return stream_; }

  // Tells a stand-in for the driver which GPU to be; a real driver has no such function.
  void pretend(int architecture, int refused) const {
    void* const found = library_ == nullptr ? nullptr : dlsym(library_, "fake_gpu");
    if (found != nullptr) reinterpret_cast<void (*)(int, int)>(found)(architecture, refused);
  }

  Buffer allocate(size_t bytes) {
    Buffer made;
    made.bytes = bytes;
    made.address = 4096 * (++count_);
    if (library_ == nullptr) return made;
    size_t const all = bytes + Buffer::kGuard;
    if (good("cuMemAlloc", call<int(uint64_t*, size_t)>("cuMemAlloc_v2")(&made.address, all))) {
      good("cuMemsetD8", call<int(uint64_t, unsigned char, size_t)>("cuMemsetD8_v2")(made.address, 0xff, all));
    }
    return made;
  }

  void write(Buffer& buffer, std::string const& data) const {
    buffer.written = data;
    good("cuMemcpyHtoD",
         call<int(uint64_t, void const*, size_t)>("cuMemcpyHtoD_v2")(buffer.address, data.data(), data.size()));
  }

  // The tensor; a byte behind it that changed is printed with the name.
  std::string read(Buffer const& buffer, std::string const& name) const {
    std::string all(buffer.bytes + Buffer::kGuard, '\0');
    if (!good("cuMemcpyDtoH",
              call<int(void*, uint64_t, size_t)>("cuMemcpyDtoH_v2")(all.data(), buffer.address, all.size())))
      return "";
    if (all.find_first_not_of('\xff', buffer.bytes) != std::string::npos) std::printf("overrun %s\n", name.c_str());
    all.resize(buffer.bytes);
    return all;
  }

  // Waits for everything; prints an error of the context, which would stay there.
  bool finish() const { return library_ == nullptr || good("cuCtxSynchronize", call<int()>("cuCtxSynchronize")()); }

  void release(std::vector<Buffer> const& buffers) {
    for (Buffer const& buffer : buffers) {
      if (library_ != nullptr) call<int(uint64_t)>("cuMemFree_v2")(buffer.address);
    }
    count_ = 0;
  }

 private:
  template <class Function>
  Function* call(char const* name) const {
    void* const found = dlsym(library_, name);
    return found == nullptr ? nullptr : reinterpret_cast<Function*>(found);
  }

  static bool good(char const* name, int code) {
    if (code != 0) std::printf("cuda %s %d\n", name, code);
    return code == 0;
  }

  void* library_;
  void* stream_ = reinterpret_cast<void*>(77);
  bool usable_ = false;
  uint64_t count_ = 0;
};
