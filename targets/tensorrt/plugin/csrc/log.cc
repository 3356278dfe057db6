#include "log.h"

#include <atomic>
#include <cstdio>

namespace h1 {
namespace {

std::atomic<nvinfer1::ILogger*> g_logger{nullptr};

}  // namespace

void set_logger(nvinfer1::ILogger* logger) { g_logger = logger; }

bool fail(char const* op, std::string const& text) {
  std::string const line = std::string("h1export::") + op + ": " + text;
  if (nvinfer1::ILogger* logger = g_logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  return false;
}

}  // namespace h1
