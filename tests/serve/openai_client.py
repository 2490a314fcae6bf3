"""What a user of the official client writes; run by an interpreter that has it: BASE_URL MODEL. Prints what it saw as JSON."""

import json
import sys

import openai


def main(base_url, model):
    client = openai.OpenAI(base_url=base_url, api_key="sk-test", max_retries=0)
    messages = [{"role": "user", "content": "hello"}]
    said = {"models": [m.id for m in client.models.list()]}
    said["chat"] = client.chat.completions.create(model=model, messages=messages).choices[0].message.content
    stream = client.chat.completions.create(model=model, messages=messages, stream=True)
    said["stream"] = [part.choices[0].delta.content for part in stream]
    said["completion"] = client.completions.create(model=model, prompt="hello").choices[0].text
    said["embedding"] = client.embeddings.create(model=model, input="hello", encoding_format="float").data[0].embedding
    try:
        client.chat.completions.create(model="nobody", messages=messages)
    except openai.NotFoundError as e:
        said["nobody"] = e.code
    try:
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError as e:
        said["wrong key"] = e.code
    said["broken stream"] = []
    try:
        for part in client.chat.completions.create(model="broken", messages=messages, stream=True):
            said["broken stream"].append(part.choices[0].delta.content)
    except openai.APIError as e:
        said["broken stream"].append(e.code)
    try:
        client.chat.completions.create(model="full", messages=messages)
    except openai.RateLimitError as e:
        said["full"] = [e.code, e.response.headers["retry-after"]]
    waited = client.chat.completions.create(model="late", messages=messages, stream=True)
    said["late"] = [part.choices[0].delta.content for part in waited]
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
