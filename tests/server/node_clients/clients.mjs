// Talks to a server with the public Node clients; prints what they made of it as one JSON object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const baseURL = process.argv[2];
const found = {};
const question = "What is the weather in Paris?";
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const description = "Get the weather of a city";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a KV cache?" }];
const whole = await client.chat.completions.create({ model: "demo", messages });
found.whole = whole.choices[0].message.content;
let streamed = "";
const stream = await client.chat.completions.create({
  model: "demo", messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  found.usage = chunk.usage ?? found.usage;
}
found.streamed = streamed;
const run = client.chat.completions.stream({
  model: "demo",
  messages: [{ role: "user", content: question }],
  tools: [{ type: "function", function: { name: "get_weather", description, parameters } }],
});
const called = (await run.finalChatCompletion()).choices[0];
found.call = [called.finish_reason, called.message.tool_calls[0].function];
try {
  await client.chat.completions.create({ model: "none", messages });
} catch (error) {
  found.error = [error.status, error.code, error.constructor.name];
}

const provider = createOpenAICompatible({ name: "nanovllm", baseURL, apiKey: "none", includeUsage: true });
const model = provider("demo");
const answer = streamText({ model, messages });
found.sdk = await answer.text;
found.sdkTokens = (await answer.usage).outputTokens;
const tools = { get_weather: tool({ description, inputSchema: jsonSchema(parameters) }) };
found.sdkCall = (await generateText({ model, prompt: question, tools })).toolCalls[0].input;
found.sdkStreamedCall = (await streamText({ model, prompt: question, tools }).toolCalls)[0].input;
console.log(JSON.stringify(found));
