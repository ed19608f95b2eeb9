"""Parts of the back end for OpenAI-compatible servers: transport, budget, probing, schema."""
