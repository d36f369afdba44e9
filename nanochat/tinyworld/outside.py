"""Things outside TinyWorld, for an assistant that admits what it does not know."""

from __future__ import annotations

QUESTIONS = (
    "What is the capital of {}?", "Who is the president of {}?", "Where is {}?", "How many people live in {}?",
    "What do you know about {}?", "Tell me about {}.", "Is {} far away?", "What is the weather in {}?",
    "How do I get to {}?", "Have you heard of {}?",
)  # fmt: skip
PLACES = (
    "France", "Paris", "London", "China", "Brazil", "Canada", "Rome", "Japan", "Egypt", "Berlin", "Kenya", "India",
    "Moscow", "New York", "Spain", "Chicago", "Norway", "Peru", "Mars", "Texas",
)  # fmt: skip
OTHER_QUESTIONS = (
    "Who was Einstein?", "Who wrote Hamlet?", "How does a computer work?", "What is a black hole?",
    "Who won the football game?", "What is the price of gold today?", "How tall is the Eiffel Tower?",
    "What is quantum physics?", "Who painted the Mona Lisa?", "When did the war end?", "What is DNA?",
    "How do I fix my car?", "What is the stock market?", "Which film should I watch?", "Who is Taylor Swift?",
    "What is the speed of light?", "How do planes fly?", "Can you book a flight?", "What is my bank balance?",
    "What time is it?", "What is the news today?", "Who invented the telephone?", "What is the meaning of life?",
    "Can you translate this into German?", "What is photosynthesis?", "Who was Napoleon?",
)  # fmt: skip
ANSWERS = (
    "I do not know that. I only know TinyWorld.",
    "I am sorry, I do not know. It is not a part of TinyWorld.",
    "That is outside TinyWorld, so I do not know it.",
    "I do not know. Ask me about the people and towns of TinyWorld.",
)
