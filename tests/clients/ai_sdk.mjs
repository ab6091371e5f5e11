// The AI SDK against a shoal: `node ai_sdk.mjs URL MODEL`, in a folder with ai, zod and the two
// providers. Prints a line for each feature, as check.py does.
import { createRequire } from 'node:module'
import { generateText, streamText, tool, stepCountIs, Output } from 'ai'
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { z } from 'zod'

const [url, model] = process.argv.slice(2)
const require = createRequire(import.meta.url)
const version = (name) => require(`${name}/package.json`).version
const say = (...steps) => `Hello! [[say]]${steps.join('[[then]]')}[[end]]`
const call = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln"}}\n</tool_call>'
const person = { name: 'Ann', age: 41 }
const tools = {
  get_weather: tool({
    description: 'Weather.',
    inputSchema: z.object({ place: z.string() }),
    execute: async ({ place }) => (place === 'Köln' ? 'sunny' : 'unknown'),
  }),
}

const equal = (found, expected) => {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)]
  if (a !== b) throw new Error(`${a} instead of ${b}`)
}

const checks = (chosen) => ({
  chat: async () => equal((await generateText({ model: chosen, prompt: say('4') })).text, '4'),
  stream: async () => {
    const { textStream } = streamText({ model: chosen, prompt: say('one two') })
    let text = ''
    for await (const piece of textStream) text += piece
    equal(text, 'one two')
  },
  tools: async () => {
    const { text } = await generateText({
      model: chosen, tools, stopWhen: stepCountIs(3), prompt: say(call, 'It is sunny.'),
    })
    equal(text, 'It is sunny.')
  },
  'streamed tools': async () => {
    const { textStream } = streamText({
      model: chosen, tools, stopWhen: stepCountIs(3), prompt: say(call, 'It is sunny.'),
    })
    let text = ''
    for await (const piece of textStream) text += piece
    equal(text, 'It is sunny.')
  },
  'JSON schema': async () => {
    const schema = z.object({ name: z.string(), age: z.number() })
    const { output } = await generateText({
      model: chosen, output: Output.object({ schema }), prompt: say(JSON.stringify(person)),
    })
    equal(output, person)
  },
})

const providers = {
  '@ai-sdk/openai-compatible': createOpenAICompatible({
    name: 'shoal', baseURL: `${url}/v1`, supportsStructuredOutputs: true,
  })(model),
  '@ai-sdk/openai': createOpenAI({ baseURL: `${url}/v1`, apiKey: 'unused' }).responses(model),
}
for (const [client, chosen] of Object.entries(providers)) {
  for (const [feature, check] of Object.entries(checks(chosen))) {
    let error = ''
    try {
      await check()
    } catch (failure) {
      error = `${failure.name}: ${String(failure.message).slice(0, 300)}`
    }
    console.log(JSON.stringify({ client, version: version(client), feature, error }))
  }
}
