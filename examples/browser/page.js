// Loads ./model with transformers.js and continues a prompt, greedily. ?device=wasm or webgpu chooses what computes;
// without it, WebGPU does where the browser has an adapter.
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "./lib/transformers.min.js";

const WARM = 16; // tokens before V8 has compiled all of ONNX Runtime with its optimising compiler
const at = (id) => document.getElementById(id);
const show = (state, text) => {
  document.body.dataset.state = state;
  at("status").textContent = text;
};

const chosen = new URLSearchParams(location.search).get("device");
const adapter = await navigator.gpu?.requestAdapter();
const device = chosen ?? (adapter ? "webgpu" : "wasm");
const build = device === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded";
env.allowRemoteModels = false; // nothing is looked up on the Hub
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false;
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = Object.fromEntries(
  ["mjs", "wasm"].map((ending) => [ending, new URL(`lib/${build}.${ending}`, document.baseURI).href]),
);

let tokenizer;
let model;
try {
  const start = performance.now();
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { device });
  document.body.dataset.device = device;
  document.body.dataset.adapter = String(Boolean(adapter));
  document.body.dataset.loaded = String(performance.now() - start);
  document.querySelector("button").disabled = false;
  show("ready", `Ready on ${device}`);
} catch (error) {
  show("failed", `The model could not be loaded on ${device}: ${error.message}`);
}

document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  document.querySelector("button").disabled = true;
  show("running", "Generating");
  at("text").textContent = "";
  const times = [];
  const streamer = new TextStreamer(tokenizer, {
    skip_special_tokens: true,
    callback_function: (text) => at("text").append(text),
    token_callback_function: () => times.push(performance.now()),
  });
  try {
    const inputs = tokenizer(at("prompt").value);
    await model.generate({ ...inputs, max_new_tokens: Number(at("tokens").value), do_sample: false, streamer });
    const steps = times.slice(1).map((time, index) => time - times[index]).slice(WARM);
    const median = steps.sort((a, b) => a - b)[steps.length >> 1];
    document.body.dataset.median = String(median);
    document.body.dataset.fastest = String(steps[0]);
    show("done", median === undefined ? `Done on ${device}` : `${median.toFixed(1)} ms a token on ${device}`);
  } catch (error) {
    show("failed", `Generating failed on ${device}: ${error.message}`);
  }
  document.querySelector("button").disabled = false;
});
