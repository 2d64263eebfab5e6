// Greedy tokens of a shipped folder in Node: node continue.mjs FOLDER DTYPE COUNT ID...
import { basename, dirname } from 'node:path';
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from '@huggingface/transformers';

const [folder, dtype, count, ...ids] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const name = basename(folder);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, local_files_only: true });
const input_ids = new Tensor('int64', BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
const attention_mask = new Tensor('int64', new BigInt64Array(ids.length).fill(1n), [1, ids.length]);
const made = await model.generate({ input_ids, attention_mask, max_new_tokens: Number(count), do_sample: false });
const tokenizer = await AutoTokenizer.from_pretrained(name, { local_files_only: true });
const text = tokenizer.apply_chat_template([{ role: 'user', content: 'Hello, é 雨 🙂' }], {
  tokenize: false,
  add_generation_prompt: true,
});
console.log(
  JSON.stringify({
    tokens: Array.from(made.data, Number).slice(ids.length),
    text,
    ids: tokenizer(text, { add_special_tokens: false }).input_ids.tolist()[0].map(Number),
  }),
);
