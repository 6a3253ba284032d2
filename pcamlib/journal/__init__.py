"""The journal: evidence -> JOURNAL.md and HTML, and what is wrong with it."""
