GROUP = "text"
