// CUDA's driver, found when first used: the library links against no CUDA, and loads where there is none.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cubins.h"

namespace h1 {

using Grid = std::array<uint32_t, 3>;

// The most programs along each dimension of a grid (CUDA C++ Programming Guide, "Technical Specifications").
constexpr int64_t kMostGrid[] = {2147483647, 65535, 65535};

// Makes a grid of three numbers that are not negative. False, and why, where a GPU takes no such grid.
bool make_grid(std::array<int64_t, 3> const& programs, Grid& grid, std::string& why);

// The architecture of the current context's GPU, such as 80; 0, and why, where there is none.
int32_t gpu_architecture(std::string& why);

// Loads the machine code into the current context, unless it is there. Not during the capture of a CUDA graph.
bool load(Cubin const& cubin, std::string& why);

bool launch(Cubin const& cubin, Grid const& grid, std::vector<void*> arguments, cudaStream_t stream, std::string& why);

}  // namespace h1
