"""What a server is asked where nobody names prompts: short questions of different kinds, in several languages and code.

Contract: constants alone.
"""

from __future__ import annotations

DEFAULT_PROMPTS = (
    "Explain to a ten-year-old why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a short docstring.",
    "List five things to check before a long bicycle tour.",
    "Translate into French: The library closes at eight, but the café stays open until midnight.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take? Show each step.",
    "Write a polite e-mail to a neighbour whose dog barks at night.",
    "What is the difference between weather and climate?",
    "Summarise in two sentences what a compiler does.",
    "Give me a recipe for lentil soup for four people.",
    "Write a haiku about an empty railway station.",
    "Schreibe drei Sätze über die Geschichte des Buchdrucks.",
    'Turn this into JSON with the keys name, age and city: "Ana is 31 and lives in Porto."',
    "Name three advantages and three disadvantages of working from home.",
    "Write an SQL query that counts the orders of each customer in the table orders.",
    "How do vaccines work?",
    "Continue the story: The lighthouse keeper found a letter in a bottle.",
)
