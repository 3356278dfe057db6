// Reads jobs from standard input as JSON, and prints what transformers.js answers to each.
import { readFileSync } from "node:fs";

import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
const int64 = (values, dims) => new Tensor("int64", BigInt64Array.from(values.flat(), BigInt), dims);

const tasks = {
  // the logits after every call, each of which continues the one before
  async steps({ folder, calls }) {
    const model = await AutoModelForCausalLM.from_pretrained(folder);
    const answers = [];
    let past_key_values = null;
    let total = 0;
    for (const ids of calls) {
      total += ids.length;
      const attention_mask = int64(new Array(total).fill(1), [1, total]);
      const output = await model({ input_ids: int64(ids, [1, ids.length]), attention_mask, past_key_values });
      answers.push(output.logits.tolist()[0]);
      past_key_values ??= {};
      for (const [name, value] of Object.entries(output)) {
        const past = name.replace("present_", "past_").replace("present", "past_key_values");
        if (name !== past) past_key_values[past] = value;
      }
    }
    return answers;
  },
  // the texts of prompts that are padded to one length
  async batch({ folder, prompts, tokens }) {
    const tokenizer = await AutoTokenizer.from_pretrained(folder);
    const model = await AutoModelForCausalLM.from_pretrained(folder);
    const inputs = tokenizer(prompts, { padding: true });
    const output = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
    return tokenizer.batch_decode(output, { skip_special_tokens: true });
  },
  // a conversation as text
  async chat({ folder, messages }) {
    const tokenizer = await AutoTokenizer.from_pretrained(folder);
    return tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  },
};

const jobs = JSON.parse(readFileSync(0, "utf-8"));
const answers = [];
for (const job of jobs) answers.push(await tasks[job.task](job));
console.log(JSON.stringify(answers));
