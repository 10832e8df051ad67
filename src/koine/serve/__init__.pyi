from .chat.conversation import Conversation as Conversation
