"""Adapters to evaluation toolkits and servers, each with an environment of its own."""
