// What a program with the `openai` package does. Arguments: the base URL and the key. Ends with status 0 if all of it holds.

import assert from "node:assert/strict";
import OpenAI, {
  APIError,
  APIUserAbortError,
  AuthenticationError,
  BadRequestError,
  InternalServerError,
  NotFoundError,
} from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Tell me a story" }];
const hello = { model: "mock", messages, max_tokens: 8 };

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function refused(kind, call, expected) {
  const error = await call().then(() => assert.fail("it was not refused"), (error) => error);
  assert.equal(error.constructor, kind, error.stack);
  for (const [name, value] of Object.entries(expected)) assert.equal(error[name], value, `${name}: ${error.message}`);
  return error;
}

const checks = {
  async models() {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    assert.deepEqual(ids.sort(), ["alias/of", "broken", "busy", "mock"]);
    assert.equal((await client.models.retrieve("alias/of")).object, "model");
  },

  async aChatIsTheSameWholeAndStreamed() {
    const { data: whole, response } = await client.chat.completions.create(hello).withResponse();
    assert.ok(response.headers.get("x-request-id"));
    const [choice] = whole.choices;
    assert.equal(choice.finish_reason, "length");
    assert.equal(choice.message.content.length, 8);
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await collect(await client.chat.completions.create({ ...hello, ...options }));
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.equal(chunks.map((each) => each.choices[0]?.delta.content ?? "").join(""), choice.message.content);
    assert.deepEqual(chunks.at(-1).usage, whole.usage);
    assert.equal(whole.usage.completion_tokens, 8);
    // The package's own reader of streams, which checks the order of chunks.
    const runner = client.chat.completions.stream(hello);
    assert.equal(await runner.finalContent(), choice.message.content);
  },

  async aCompletionIsTheSameWholeAndStreamed() {
    const request = { model: "mock", prompt: ["abc", "de"], max_tokens: 6, n: 2, seed: 3 };
    const whole = await client.completions.create(request);
    const texts = whole.choices.map((each) => each.text);
    assert.deepEqual(texts.map((each) => each.length), [6, 6, 6, 6]);
    assert.equal(new Set(texts).size, 4);
    const streamed = ["", "", "", ""];
    for await (const chunk of await client.completions.create({ ...request, stream: true }))
      for (const each of chunk.choices) streamed[each.index] += each.text;
    assert.deepEqual(streamed, texts);
  },

  async parameters() {
    const answer = await client.chat.completions.create({
      model: "mock", messages, n: 2, seed: 7, max_completion_tokens: 12, logprobs: true, top_logprobs: 2,
      temperature: 0.5, top_p: 0.9, frequency_penalty: 0.1, presence_penalty: 0.1, logit_bias: { 65: -100 },
      user: "u", metadata: { a: "b" }, store: false, parallel_tool_calls: true, service_tier: "auto",
      top_k: 5, min_p: 0.1, min_tokens: 12, ignore_eos: true, repetition_penalty: 1.1, stop_token_ids: [1],
    });
    assert.equal(answer.choices.length, 2);
    for (const each of answer.choices) {
      assert.equal(each.logprobs.content.length, 12);
      assert.equal(each.logprobs.content[0].top_logprobs.length, 2);
    }
    const text = answer.choices[0].message.content;
    const stopped = await client.chat.completions.create({
      model: "mock", messages, seed: 7, max_completion_tokens: 12, stop: [text.slice(4, 7)],
    });
    assert.equal(stopped.choices[0].message.content, text.slice(0, text.indexOf(text.slice(4, 7))));
    assert.equal(stopped.choices[0].finish_reason, "stop");
    const json = await client.chat.completions.create({
      ...hello, max_tokens: 200, response_format: { type: "json_object" },
    });
    JSON.parse(json.choices[0].message.content);
  },

  async embeddings() {
    // The package asks for base64 and decodes it, unless a format is given.
    const decoded = await client.embeddings.create({ model: "mock", input: ["a", "b"] });
    const floats = await client.embeddings.create({ model: "mock", input: ["a", "b"], encoding_format: "float" });
    assert.deepEqual(decoded.data, floats.data);
    assert.ok(decoded.data[0].embedding.length > 1);
    assert.equal(decoded.usage.prompt_tokens, 2);
  },

  async errors() {
    const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    await refused(AuthenticationError, () => stranger.models.list(), { status: 401, code: "invalid_api_key" });
    const chat = (changes) => () => client.chat.completions.create({ ...hello, ...changes });
    const bad = { status: 400, type: "invalid_request_error" };
    await refused(BadRequestError, chat({ temperature: 3 }), { ...bad, param: "temperature" });
    await refused(BadRequestError, chat({ audio: {} }), { ...bad, param: "audio", code: "unsupported_parameter" });
    await refused(BadRequestError, chat({ messages: [] }), { ...bad, param: "messages" });
    await refused(BadRequestError, chat({ max_tokens: 1e6 }), { ...bad, code: "context_length_exceeded" });
    await refused(NotFoundError, chat({ model: "none" }), { status: 404, code: "model_not_found", param: "model" });
    await refused(NotFoundError, () => client.models.retrieve("none"), { status: 404, code: "model_not_found" });
    await refused(NotFoundError, () => client.responses.create({ model: "mock", input: "a" }), { code: "unknown_url" });
    await refused(APIError, chat({ user: "x".repeat(1 << 20) }), { status: 413, code: "request_too_large" });
    const broken = { model: "broken", prompt: "abc" };
    const failed = { code: "engine_error" };
    await refused(InternalServerError, () => client.completions.create({ ...broken, max_tokens: 1 }), failed);
    const stream = await client.completions.create({ ...broken, stream: true });
    let text = "";
    const read = async () => { for await (const each of stream) text += each.choices[0].text; };
    await refused(APIError, read, failed);
    assert.equal(text, "ab");
  },

  async overloadAndAClientThatLeaves() {
    const request = { model: "busy", messages, max_tokens: 1000 }; // Its answer would take minutes.
    const create = () => client.chat.completions.create({ ...request, stream: true });
    const stream = await create();
    const error = await refused(InternalServerError, create, { status: 503, code: "overloaded" });
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    await active(1);
    for await (const each of stream) if (each.choices[0].delta.content) break; // The package then disconnects.
    await active(0);
    const leaving = new AbortController();
    const whole = client.chat.completions.create(request, { signal: leaving.signal });
    const ended = whole.then(() => assert.fail("it was not aborted"), (error) => error);
    await active(1);
    leaving.abort();
    assert.equal((await ended).constructor, APIUserAbortError);
    await active(0);
  },
};

// Waits until the engine of the model `busy` has so many requests.
async function active(count) {
  for (let found = -1; found !== count; ) {
    const page = await (await fetch(new URL("/metrics", baseURL))).text();
    found = Number(/^triton_llm_requests_active\{model="busy"\} (\S+)$/m.exec(page)[1]);
  }
}

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
