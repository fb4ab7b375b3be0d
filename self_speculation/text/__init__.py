"""Token ids to text, stop words, thinking and grammars."""
