
/** Open the model file at `path`. */
export async function loadModel(path: string): Promise<InferenceSession> {
  return InferenceSession.create(path, { executionProviders: ['cpu'], intraOpNumThreads: THREADS })
}

/** The likeliest tokens after `prompt`, one by one to `onToken`; tokenizer.json beside the model makes ids of text. */
export async function answer(
  session: InferenceSession,
  prompt: number[],
  onToken: (token: number) => void = () => {},
  most = 256,
): Promise<number[]> {
  const integers = (values: number[], dims: number[]) => new Tensor('int64', BigInt64Array.from(values.map(BigInt)), dims)
  let cache: Record<string, Tensor> = {}
  for (const [name, dims] of Object.entries(CACHE)) cache[name] = new Tensor('float32', new Float32Array(0), dims)
  const said: number[] = []
  let ids = prompt
  let length = 0
  while (said.length < most) {
    length += ids.length
    const outputs = await session.run({
      input_ids: integers(ids, [1, ids.length]),
      attention_mask: integers(new Array(length).fill(1), [1, length]),
      num_logits_to_keep: integers([1], []),
      ...cache,
    })
    const logits = outputs.logits.data as Float32Array
    let token = 0
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[token]) token = i
    said.push(token)
    onToken(token)
    if (STOP.includes(token) || length >= CONTEXT) break
    const next: Record<string, Tensor> = {}
    for (const name of Object.keys(cache)) next[name] = outputs[name.replace('past_key_values', 'present')] as Tensor
    cache = next
    ids = [token]
  }
  return said
}
