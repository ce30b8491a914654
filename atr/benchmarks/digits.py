GROUP = "general"
