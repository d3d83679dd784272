"""From any source of preference pairs to token ids; `tokens` is all that training needs to know."""
