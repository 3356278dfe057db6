// What TensorRT looks for in a plugin library.
#include "creator.h"
#include "log.h"

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {h1::ssm_scan_creator(), h1::causal_conv_creator()};
  count = 2;
  return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  if (finder != nullptr) h1::set_logger(finder->findLogger());
}
