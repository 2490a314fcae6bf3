"""What a user of the official client asks two engines; run by an interpreter that has it: BASE_URL CHAT EMBEDDINGS. Prints what it got as JSON."""

import json
import sys

import openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main(base_url, chat, embeddings):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=900)
    exactly = {"max_tokens": 12, "temperature": 0}
    said = {"models": [m.id for m in client.models.list()]}
    parts = client.chat.completions.create(model=chat, messages=QUESTION, stream=True, **exactly)
    said["stream"] = [part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content]
    vectors = client.embeddings.create(model=embeddings, input=["Paris", "the capital of France", "a cold start"]).data
    said["embeddings"] = [v.embedding for v in vectors]
    plain = client.embeddings.create(model=embeddings, input="Paris", encoding_format="float").data[0].embedding
    said["embedding"] = plain
    for model in (chat, embeddings):
        answer = client.chat.completions.create(model=model, messages=QUESTION, **exactly)
        said[f"chat {model}"] = answer.choices[0].message.content
    said["completion"] = (
        client.completions.create(model=chat, prompt="The capital of France is", **exactly).choices[0].text
    )
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
