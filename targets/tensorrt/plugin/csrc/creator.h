// Makes plugins of an op from a network's attributes, and from what an engine holds.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "plugin.h"

namespace h1 {

template <class Op>
class Creator final : public IPluginCreatorV3One {
 public:
  Creator() {
    for (Field const& field : Op::fields()) names_.emplace_back(field.name, nullptr, field.type, 1);
    names_.emplace_back(kInPlace, nullptr, PluginFieldType::kINT32, 1);
    collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
  }

  char const* getPluginName() const noexcept override { return Op::kName; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(AsciiChar const* layer, PluginFieldCollection const* given,
                          TensorRTPhase phase) noexcept override {
    typename Op::Attributes attributes;
    int32_t in_place = 0;
    std::string why;
    if (given == nullptr || given->nbFields < 0 || (given->nbFields > 0 && given->fields == nullptr)) {
      fail(Op::kName, "there are no attributes");
      return nullptr;
    }
    bool ok = known(*given, why);
    for (Field const& field : Op::fields()) {
      ok = ok && read(*given, field.name, field.type, reinterpret_cast<char*>(&attributes) + field.offset, why);
    }
    ok = ok && read(*given, kInPlace, PluginFieldType::kINT32, &in_place, why);
    if (ok && in_place != 0 && in_place != 1) {
      ok = false;
      why = std::string("attribute ") + kInPlace + " is " + std::to_string(in_place) + ", and must be 0 or 1";
    }
    ok = ok && Op::check(attributes, why);
    if (ok && phase == TensorRTPhase::kRUNTIME) ok = built_by_us(*given, why);
    if (ok) return new Plugin<Op>(attributes, in_place);
    fail(Op::kName, std::string("layer ") + (layer == nullptr ? "" : layer) + ": " + why);
    return nullptr;
  }

 private:
  static PluginField const* find(PluginFieldCollection const& given, char const* name) {
    for (PluginField const* field = given.fields; field != given.fields + given.nbFields; ++field) {
      if (field->name != nullptr && std::strcmp(field->name, name) == 0) return field;
    }
    return nullptr;
  }

  bool known(PluginFieldCollection const& given, std::string& why) const {
    for (PluginField const* field = given.fields; field != given.fields + given.nbFields; ++field) {
      if (field->name == nullptr) {
        why = "an attribute has no name";
        return false;
      }
      if (std::strcmp(field->name, kBuiltBy) != 0 && find(collection_, field->name) == nullptr) {
        why = std::string("there is no attribute ") + field->name;
        return false;
      }
    }
    return true;
  }

  static bool read(PluginFieldCollection const& given, char const* name, PluginFieldType type, void* value,
                   std::string& why) {
    PluginField const* const field = find(given, name);
    bool const good = field != nullptr && field->data != nullptr && field->type == type && field->length == 1;
    if (good) {
      std::memcpy(value, field->data, 4);  // int32 or float
    } else {
      char const* const expected = type == PluginFieldType::kINT32 ? "one int32" : "one float32";
      why = std::string("attribute ") + name + (field == nullptr ? " is missing" : " is not ") +
            (field == nullptr ? "" : expected);
    }
    return good;
  }

  static bool built_by_us(PluginFieldCollection const& given, std::string& why) {
    PluginField const* const field = find(given, kBuiltBy);
    auto const length = static_cast<int32_t>(std::strlen(kLibrary));  // both are hashes
    bool const text =
        field != nullptr && field->data != nullptr && field->type == PluginFieldType::kCHAR && field->length == length;
    std::string const by = text ? std::string(static_cast<char const*>(field->data), field->length) : "unknown";
    if (by == kLibrary) return true;
    why = "the engine was built with plugin library " + by + ", this one is " + kLibrary +
          "; load that one, or build the engine again";
    return false;
  }

  std::vector<PluginField> names_;
  PluginFieldCollection collection_{};
};

IPluginCreatorInterface* ssm_scan_creator();
IPluginCreatorInterface* causal_conv_creator();

}  // namespace h1
