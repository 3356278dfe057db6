// Errors go to TensorRT's logger once it has given us one, to stderr before.
#pragma once

#include <string>

#include "NvInferRuntime.h"

namespace h1 {

void set_logger(nvinfer1::ILogger* logger);

// "h1export::SSMScan: text"; returns false, so that a check may end with it.
bool fail(char const* op, std::string const& text);

}  // namespace h1
