"""Stream a chat through the OpenAI class of a framework; run in an environment of its own by test_serve_frameworks.

python openai_frameworks.py langchain|llama_index http://127.0.0.1:8000/v1 QUESTION
"""

from __future__ import annotations

import sys


def langchain(url: str, question: str) -> list[str]:
    """The pieces that LangChain's ChatOpenAI yields."""
    from langchain_openai import ChatOpenAI  # pyright: ignore[reportMissingImports]

    model = ChatOpenAI(base_url=url, api_key="none", model="default", temperature=0, max_retries=0)
    messages = [("system", "Be brief."), ("user", question)]
    return [chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in model.stream(messages)]


def llama_index(url: str, question: str) -> list[str]:
    """The pieces that LlamaIndex's OpenAILike yields."""
    from llama_index.core.llms import ChatMessage  # pyright: ignore[reportMissingImports]
    from llama_index.llms.openai_like import OpenAILike  # pyright: ignore[reportMissingImports]

    model = OpenAILike(
        api_base=url, api_key="none", model="default", is_chat_model=True, temperature=0, max_tokens=200,
        context_window=512,
    )  # fmt: skip
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=question)]
    return [piece.delta or "" for piece in model.stream_chat(messages)]


if __name__ == "__main__":
    pieces = {"langchain": langchain, "llama_index": llama_index}[sys.argv[1]](*sys.argv[2:])
    print(len([piece for piece in pieces if piece]), "".join(pieces))
