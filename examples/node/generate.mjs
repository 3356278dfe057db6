// Continue a prompt, greedily, with transformers.js in Node:
//
//   node generate.mjs FOLDER PROMPT [TOKENS]
//
// FOLDER is what `h1export build --target ort --layout transformers.js --out FOLDER` made. The text is that of
// `h1export generate FOLDER PROMPT --max-tokens TOKENS`.
import { resolve } from "node:path";
import { argv, stdout } from "node:process";

import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";

const [folder, prompt, tokens = "64"] = argv.slice(2);
env.allowRemoteModels = false; // nothing is looked up on the Hub
const place = resolve(folder);
const tokenizer = await AutoTokenizer.from_pretrained(place);
const model = await AutoModelForCausalLM.from_pretrained(place);
const streamer = new TextStreamer(tokenizer, {
  skip_special_tokens: true,
  callback_function: (text) => stdout.write(text),
});
await model.generate({ ...tokenizer(prompt), max_new_tokens: Number(tokens), do_sample: false, streamer });
stdout.write("\n");
await model.dispose();
