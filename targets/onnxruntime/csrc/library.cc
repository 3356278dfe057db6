// What ONNX Runtime calls when it loads the library: every op of domain "h1export", listed once.
#include "ort.h"

namespace h1 {

const OrtCustomOp* attention_op();
const OrtCustomOp* causal_conv_op();
const OrtCustomOp* half_attention_op();
const OrtCustomOp* int8_attention_op();
const OrtCustomOp* norm_qmatmul_op();
const OrtCustomOp* pair_qmatmul_op();
const OrtCustomOp* qmatmul_op();
const OrtCustomOp* silu_mul_op();
const OrtCustomOp* silu_qmatmul_op();
const OrtCustomOp* ssm_scan_op();

namespace {

// Lives as long as the process, because sessions keep a pointer to it.
OrtCustomOpDomain* make_domain() {
  OrtCustomOpDomain* domain = nullptr;
  check(api->CreateCustomOpDomain("h1export", &domain));
  for (const OrtCustomOp* op :
       {attention_op(), half_attention_op(), int8_attention_op(), causal_conv_op(), norm_qmatmul_op(),
        pair_qmatmul_op(), qmatmul_op(), silu_mul_op(), silu_qmatmul_op(), ssm_scan_op()}) {
    check(api->CustomOpDomain_Add(domain, op));
  }
  return domain;
}

}  // namespace
}  // namespace h1

#if defined(_WIN32)
#define H1_EXPORT __declspec(dllexport)
#else
#define H1_EXPORT __attribute__((visibility("default")))
#endif

extern "C" H1_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  h1::api = base->GetApi(ORT_API_VERSION);
  if (h1::api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than h1export's ops");
  }
  try {
    static OrtCustomOpDomain* const domain = h1::make_domain();
    h1::check(h1::api->AddCustomOpDomain(options, domain));
    return nullptr;
  } catch (const std::exception& error) {
    return h1::api->CreateStatus(ORT_FAIL, error.what());
  }
}
