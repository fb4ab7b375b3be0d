"""Where drafts come from, what they have learnt, and what a round costs."""
