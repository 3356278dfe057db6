// The machine code that the library carries: a table, generated, and the choice from it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "NvInferRuntime.h"

namespace h1 {

struct Constant {
  char const* name;
  int32_t value;
};

// A kernel for one architecture, dtype and tile. `constants`: what it was compiled for, ended by a null name.
struct Cubin {
  char const* kernel;
  nvinfer1::DataType dtype;
  int32_t architecture;  // 80 for sm_80
  uint32_t threads;
  uint32_t shared;  // bytes
  char const* entry;
  unsigned char const* code;
  Constant constants[8];

  // The value of a constant; 0 where the kernel has none of that name.
  int32_t at(char const* name) const;
};

extern Cubin const kCubins[];
extern int32_t const kCubinCount;
extern char const kLibrary[];  // a hash of the library's sources and machine code

// The kernel for a GPU. Code for 9.0 and later runs on that architecture only; earlier code on later ones of its major
// number too. architecture 0: of any. Returns nullptr, and why, where the table has none.
Cubin const* find(char const* kernel, nvinfer1::DataType dtype, int32_t architecture, std::string const& shape,
                  std::function<bool(Cubin const&)> const& fits, std::string& why);

}  // namespace h1
