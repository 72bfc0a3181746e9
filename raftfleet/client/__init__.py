"""The client: one sans-IO core, driven by a synchronous and an asyncio front."""
