#include "cubins.h"

#include <cstring>
#include <set>

namespace h1 {
namespace {

constexpr int32_t kFirstExact = 90;

bool runs_on(int32_t built_for, int32_t gpu) {
  return built_for == gpu || (gpu < kFirstExact && built_for / 10 == gpu / 10 && built_for < gpu);
}

}  // namespace

int32_t Cubin::at(char const* name) const {
  for (Constant const* constant = constants; constant->name != nullptr; ++constant) {
    if (std::strcmp(constant->name, name) == 0) return constant->value;
  }
  return 0;
}

Cubin const* find(char const* kernel, nvinfer1::DataType dtype, int32_t architecture, std::string const& shape,
                  std::function<bool(Cubin const&)> const& fits, std::string& why) {
  Cubin const* best = nullptr;
  std::set<int32_t> built_for;
  for (Cubin const* cubin = kCubins; cubin != kCubins + kCubinCount; ++cubin) {
    if (std::strcmp(cubin->kernel, kernel) != 0 || cubin->dtype != dtype || !fits(*cubin)) continue;
    built_for.insert(cubin->architecture);
    bool const runs = architecture == 0 || runs_on(cubin->architecture, architecture);
    if (runs && (best == nullptr || cubin->architecture > best->architecture)) best = cubin;
  }
  if (built_for.empty()) {
    why = std::string("this library has no kernel ") + kernel + " for " + shape + "; build it for that model";
  } else if (best == nullptr) {
    why =
        std::string("kernel ") + kernel + " has no machine code for sm_" + std::to_string(architecture) + ", only for";
    for (int32_t each : built_for) why += " sm_" + std::to_string(each);
  }
  return best;
}

}  // namespace h1
