"""What the assistant does not answer: topics and requests outside its subject, and settings that do not exist.

The evaluation's are others than the training's, so that the model has to tell the known from the unknown.
"""

from scripts.smol_data.wordings import Wordings

DECLINE = "I only answer questions about SmolFactory's settings and the terms of fine-tuning."
NO_SUCH_SETTING = "SmolFactory has no such setting."


def _items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(";"))


TRAIN_TOPICS = _items("""
    a volcano; photosynthesis; the moon; a violin; cheese; a sonnet; the French Revolution; gravity; a glacier;
    chess; football; a tax return; a mortgage; jazz; a black hole; the Amazon; a tulip; a lighthouse; origami; a
    passport; the Roman Empire; a penguin; espresso; a cathedral; the stock market; yoga; an earthquake; a
    sailing boat; haiku; an umbrella; a marathon; the Sahara; bread; a telescope; inflation; a vaccine; ballet;
    a beehive; a comet; karate; the Silk Road; a carburetor; wine; a treaty; a piano; democracy; a waterfall; an
    orchid; a castle; the Renaissance; a bicycle; pottery; a wolf; a rainbow; a rocket; mathematics; a
    parliament; pneumonia; a diamond; the Pacific; a crocodile; rice; a novel; surfing; an opera; a pension; a
    hurricane; cricket; the Vikings; a kite; oxygen; a dentist; marble; a canal; an oak; Buddhism; a fossil; a
    tornado; whisky; a visa; an elephant; vitamin C; the Cold War; a guitar; a recession; sushi; a shark; a
    desert; the Louvre; knitting; a helicopter; a prime number; an atom; a museum; honey; a butterfly; a
    thunderstorm; Saturn; a drum; the Alps
""")
EVAL_TOPICS = _items("""
    an avalanche; a trumpet; the Ottoman Empire; a sparrow; baking; a symphony; the Atlantic; a tractor; a
    galaxy; a poem; archery; a lawyer; the Mediterranean; butter; a giraffe; a bridge
""")
TOPIC_WORDINGS = Wordings(
    train=(
        "What is {key}?",
        "Explain {key}.",
        "Define {key}.",
        "Tell me about {key}.",
        "What does {key} mean?",
        "Describe {key}.",
        "Give me a definition of {key}.",
        "Explain what {key} is.",
        "Tell me what {key} is about.",
        "What is the meaning of {key}?",
        "I do not understand {key}.",
        "Tell me a story about {key}.",
        "Write a poem about {key}.",
        "What do you know about {key}?",
        "How old is {key}?",
        "Where can I find {key}?",
    ),
    eval=(
        "What can you say about {key}?",
        "Do you know what {key} means?",
        "Give me the definition of {key}.",
    ),
)

TRAIN_REQUESTS = (
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What time is it?",
    "Tell me a joke.",
    "What will the weather be tomorrow?",
    "How do I cook pasta?",
    "Who won the last election?",
    "Translate good morning into German.",
    "Book a flight to Rome for me.",
    "What should I wear today?",
    "How tall is Mount Everest?",
    "Sing me a song.",
    "What is the best film of all time?",
    "Who is the president of Brazil?",
    "How many planets are there?",
    "Write an email to my landlord.",
    "Which phone should I buy?",
    "How do I lose weight?",
    "What is two plus two?",
    "Do you like music?",
    "When was the printing press invented?",
    "How far is the sun?",
    "Can you draw a cat?",
    "What is my name?",
    "Where is the nearest pharmacy?",
    "Who painted the Mona Lisa?",
    "How do I repair a flat tyre?",
    "What is the population of Japan?",
    "Give me a recipe for pancakes.",
    "Play some music.",
    "Remind me to call my mother.",
    "What is the fastest animal?",
    "Is it going to rain?",
    "Which team won the cup?",
    "How do I plant tomatoes?",
    "What does this dream mean?",
)
EVAL_REQUESTS = (
    "What is the capital of Spain?",
    "Who wrote Faust?",
    "How do I cook rice?",
    "Tell me a riddle.",
    "Who is the king of Norway?",
    "How many rivers are there?",
    "Which car should I buy?",
    "Where is the nearest hotel?",
)

TRAIN_MADE_UP = _items("""
    optim.turbo; model.layers_to_skip; data.color; training.speed; output.password; adapter.shape; hub.stars;
    optim.gamma; data.language; evaluation.judge; tracking.email; model.personality; training.pause;
    optim.patience; data.shuffle_twice; adapter.depth; output.font; hub.followers; evaluation.bleu;
    training.overtime; model.height; data.flavor; optim.rhythm; tracking.color; adapter.weight_limit; hub.price;
    output.sound; evaluation.grade; training.boost; model.mood; data.noise; optim.inertia; tracking.phone;
    adapter.color; hub.country; output.icon; evaluation.coin; training.sleep; model.age; data.sugar;
    optim.step_limit; adapter.speed; hub.language; output.volume; evaluation.rounds; training.teacher;
    model.spice; data.mirror; optim.angle; tracking.radius; adapter.glue; hub.mirror; output.width;
    evaluation.prize; training.luck; model.temper; data.river; optim.fuel; tracking.window; adapter.bridge
""")
EVAL_MADE_UP = _items("""
    optim.magic; model.voice; data.music; training.holiday; output.paper; adapter.height; hub.weather;
    evaluation.mood; tracking.camera; optim.bounce; data.garden; training.coach
""")
