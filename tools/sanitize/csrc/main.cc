// nodes SEED COUNT HOSTILE CALLS: runs COUNT nodes of the seed, each with up to HOSTILE changes, CALLS times at once, and
// prints how many ran and how many were refused. Exit code 1: a valid node was refused, left a part of its output
// unwritten, or gave an error without the name of its op. Built with -fsanitize=fuzzer, it is a libFuzzer target.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "nodes.h"

namespace {

struct Counts {
  size_t ran = 0, refused = 0;
};

// Whether four bytes that every output starts with are still there.
bool unwritten(const host::Tensor& tensor) {
  for (size_t i = 0; i + 4 <= tensor.memory.size(); i += 4) {
    if (std::memcmp(tensor.memory.data() + i, "\xee\xee\xee\xee", 4) == 0) return true;
  }
  return false;
}

bool run(Choice& choice, size_t hostile, size_t calls, std::map<std::string, Counts>& counts) {
  host::Node node = valid_node(choice);
  const std::string op = node.op;
  const size_t changes = hostile == 0 ? 0 : choice.below(hostile + 1);
  for (size_t i = 0; i < changes; ++i) make_hostile(choice, node);
  if (calls > 1) node.in_place.clear();
  const host::Result result = host::run(node, calls);
  Counts& of_op = counts[op];
  ++(result.error.empty() ? of_op.ran : of_op.refused);
  if (!result.error.empty() && (changes == 0 || result.error.rfind(op + ": ", 0) != 0)) {
    return std::fprintf(stderr, "%s refused with \"%s\" after %zu changes\n", op.c_str(), result.error.c_str(),
                        changes),
           false;
  }
  for (const host::Tensor& output : result.outputs) {
    if (result.error.empty() && unwritten(output)) {
      return std::fprintf(stderr, "%s left a part of an output unwritten after %zu changes\n", op.c_str(), changes),
             false;
    }
  }
  return true;
}

}  // namespace

#if defined(H1_FUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choice choice(data, size);
  std::map<std::string, Counts> counts;
  if (!run(choice, 3, 1, counts)) std::abort();
  return 0;
}
#else
int main(int count, char** words) {
  if (count != 5) return std::fprintf(stderr, "usage: nodes SEED COUNT HOSTILE CALLS\n"), 2;
  const unsigned long long seed = std::strtoull(words[1], nullptr, 10), nodes = std::strtoull(words[2], nullptr, 10);
  const size_t hostile = std::strtoull(words[3], nullptr, 10), calls = std::strtoull(words[4], nullptr, 10);
  std::map<std::string, Counts> counts;
  bool good = true;
  for (unsigned long long i = 0; i < nodes; ++i) {
    Choice choice(seed * 1000003 + i);
    if (run(choice, hostile, calls, counts)) continue;
    good = false;
    std::fprintf(stderr, "node %llu of seed %llu\n", i, seed);
  }
  for (const auto& [op, of_op] : counts) std::printf("%s ran %zu refused %zu\n", op.c_str(), of_op.ran, of_op.refused);
  return good ? 0 : 1;
}
#endif
