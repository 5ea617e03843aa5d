"""Word lists, questions and facts of the demonstration corpus."""

from __future__ import annotations


def listed(text: str, separator: str = ",") -> list[str]:
    """Split a list that is written as text, with line breaks wherever they suit."""
    return [" ".join(item.split()) for item in text.split(separator)]


_CAPITALS = """France=Paris Germany=Berlin Italy=Rome Spain=Madrid Portugal=Lisbon England=London Ireland=Dublin
Scotland=Edinburgh Wales=Cardiff Belgium=Brussels the_Netherlands=Amsterdam Switzerland=Bern Austria=Vienna
Poland=Warsaw Hungary=Budapest Greece=Athens Turkey=Ankara Russia=Moscow Ukraine=Kyiv Norway=Oslo Sweden=Stockholm
Denmark=Copenhagen Finland=Helsinki Iceland=Reykjavik Estonia=Tallinn Latvia=Riga Lithuania=Vilnius Romania=Bucharest
Bulgaria=Sofia Serbia=Belgrade Croatia=Zagreb Slovenia=Ljubljana Slovakia=Bratislava Albania=Tirana Malta=Valletta
Cyprus=Nicosia Japan=Tokyo China=Beijing India=New_Delhi South_Korea=Seoul Thailand=Bangkok Vietnam=Hanoi
Indonesia=Jakarta the_Philippines=Manila Nepal=Kathmandu Pakistan=Islamabad Bangladesh=Dhaka Mongolia=Ulaanbaatar
Iran=Tehran Iraq=Baghdad Israel=Jerusalem Jordan=Amman Lebanon=Beirut Syria=Damascus Saudi_Arabia=Riyadh Egypt=Cairo
Morocco=Rabat Algeria=Algiers Tunisia=Tunis Libya=Tripoli Kenya=Nairobi Ethiopia=Addis_Ababa Ghana=Accra
Nigeria=Abuja Senegal=Dakar Uganda=Kampala Rwanda=Kigali Zambia=Lusaka Angola=Luanda Canada=Ottawa
the_United_States=Washington Mexico=Mexico_City Cuba=Havana Jamaica=Kingston Brazil=Brasilia Argentina=Buenos_Aires
Chile=Santiago Peru=Lima Colombia=Bogota Venezuela=Caracas Ecuador=Quito Uruguay=Montevideo Paraguay=Asuncion
Australia=Canberra New_Zealand=Wellington Fiji=Suva"""
CAPITALS = [tuple(p.replace("_", " ") for p in pair.split("=")) for pair in _CAPITALS.split()]

ONE_WORD = (
    " Answer with one word.",
    " Answer in one word.",
    " One word.",
    " One word, please.",
    " Just one word.",
    " Use one word.",
    " Reply with one word.",
    " Answer with a single word.",
    " In one word.",
    " One word only.",
    " Only one word.",
)
FULL = (" Answer with a full sentence.", " Use a full sentence.", " Answer in a sentence.")

CAPITAL_ASK = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Which city is the capital of {c}?",
    "Name the capital of {c}.",
    "Tell me the capital of {c}.",
    "Do you know the capital of {c}?",
    "Can you tell me the capital of {c}?",
    "What is the capital city of {c}?",
    "What city is the capital of {c}?",
    "Please name the capital of {c}.",
    "I would like to know the capital of {c}.",
)
CAPITAL_SHORT = ("Capital of {c}?", "Capital of {c}", "The capital of {c}?", "The capital of {c} is")
COUNTRY_ASK = (
    "Which country has {k} as its capital?",
    "{k} is the capital of which country?",
    "What country is {k} the capital of?",
    "Of which country is {k} the capital?",
)

# Each fact kind: (questions, sentence to answer with, pairs). {x} is asked for and {y} is the answer.
_FACTS = {
    "colour": (
        ("What colour is {x}?", "What color is {x}?", "Which colour does {x} have?", "Tell me the colour of {x}."),
        "{X} is {y}.",
        "the sky=blue,grass=green,snow=white,a lemon=yellow,a banana=yellow,a tomato=red,coal=black,chocolate=brown,"
        "a carrot=orange,the sun=yellow,milk=white,a strawberry=red,a leaf=green,the night=black,blood=red,"
        "a frog=green,an orange=orange,a cherry=red,the sea=blue,a flamingo=pink",
    ),
    "sound": (
        ("What does {x} say?", "What sound does {x} make?", "Which sound does {x} make?"),
        "{X} says {y}.",
        "a cow=moo,a dog=woof,a cat=meow,a duck=quack,a sheep=baa,a pig=oink,a horse=neigh,a lion=roar,a bee=buzz,"
        "a snake=hiss,a mouse=squeak,an owl=hoot,a frog=ribbit,a wolf=howl,a rooster=cock-a-doodle-doo",
    ),
    "baby": (
        ("What is a baby {x} called?", "What do you call a baby {x}?", "What is a young {x} called?"),
        "A baby {x} is called {a}.",
        "dog=puppy,cat=kitten,cow=calf,sheep=lamb,horse=foal,duck=duckling,pig=piglet,goat=kid,bear=cub,swan=cygnet,"
        "kangaroo=joey,hen=chick",
    ),
    "opposite": (
        (
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Opposite of {x}?",
        ),
        "The opposite of {x} is {y}.",
        "hot=cold,cold=hot,big=small,small=big,up=down,down=up,day=night,night=day,black=white,white=black,fast=slow,"
        "slow=fast,happy=sad,sad=happy,old=young,young=old,open=closed,full=empty,empty=full,long=short,short=long,"
        "left=right,wet=dry,dry=wet,light=dark,dark=light,loud=quiet,quiet=loud,rich=poor,poor=rich,strong=weak,"
        "early=late,late=early,good=bad,bad=good,soft=hard,hard=soft,yes=no,true=false,in=out,first=last",
    ),
    "day after": (
        (
            "What day comes after {x}?",
            "Which day comes after {x}?",
            "Which day follows {x}?",
            "What is the day after {x}?",
        ),
        "{y} comes after {x}.",
        "Monday=Tuesday,Tuesday=Wednesday,Wednesday=Thursday,Thursday=Friday,Friday=Saturday,Saturday=Sunday,"
        "Sunday=Monday",
    ),
    "day before": (
        ("What day comes before {x}?", "Which day comes before {x}?", "What is the day before {x}?"),
        "{y} comes before {x}.",
        "Tuesday=Monday,Wednesday=Tuesday,Thursday=Wednesday,Friday=Thursday,Saturday=Friday,Sunday=Saturday,"
        "Monday=Sunday",
    ),
    "month after": (
        ("What month comes after {x}?", "Which month comes after {x}?", "Which month follows {x}?"),
        "{y} comes after {x}.",
        "January=February,February=March,March=April,April=May,May=June,June=July,July=August,August=September,"
        "September=October,October=November,November=December,December=January",
    ),
    "legs": (
        ("How many legs does {x} have?", "How many legs has {x}?", "Tell me how many legs {x} has."),
        "{X} has {y} legs.",
        "a dog=four,a cat=four,a horse=four,a cow=four,a spider=eight,a bird=two,a duck=two,an ant=six,a bee=six,"
        "a chair=four,an octopus=eight,a person=two",
    ),
    "sides": (
        ("How many sides does {x} have?", "How many corners does {x} have?"),
        "{X} has {y}.",
        "a triangle=three,a square=four,a rectangle=four,a pentagon=five,a hexagon=six",
    ),
    "home": (
        ("Where does {x} live?", "Where do you find {x}?"),
        "{X} lives in {y}.",
        "a fish=water,a bee=a hive,a bird=a nest,a spider=a web,a king=a castle,a bear=a forest,a camel=a desert,"
        "a lion=Africa,a penguin=Antarctica,a kangaroo=Australia",
    ),
    "letter": (
        ("What letter comes after {x}?", "Which letter comes after {x}?", "Which letter follows {x}?"),
        "{y} comes after {x}.",
        ",".join(f"{a}={b}" for a, b in zip("ABCDEFGHIJKLMNOPQRSTUVWXY", "BCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True)),
    ),
    "count": (
        ("How many {x}?", "Tell me how many {x}.", "Do you know how many {x}?"),
        "There are {y}.",
        "days are in a week=seven,months are in a year=twelve,hours are in a day=twenty-four,"
        "minutes are in an hour=sixty,seconds are in a minute=sixty,eggs are in a dozen=twelve,"
        "seasons are in a year=four,letters are in the alphabet=twenty-six,colours are in a rainbow=seven,"
        "wheels are on a bike=two,wheels are on a car=four,fingers are on a hand=five,planets are there=eight",
    ),
    "maker": (
        ("Who {x}?", "Tell me who {x}.", "Do you know who {x}?"),
        "{A} {x}.",
        "bakes bread=baker,flies a plane=pilot,teaches children=teacher,grows corn=farmer,puts out fires=firefighter,"
        "drives a bus=driver,sails a ship=sailor,paints pictures=painter,writes books=writer,cooks food=cook,"
        "helps sick people=doctor,wears a crown=king,looks after a garden=gardener,catches fish=fisherman",
    ),
}
FACTS = {k: (q, s, [tuple(p.split("=")) for p in pairs.split(",")]) for k, (q, s, pairs) in _FACTS.items()}

ABOUT_ME = "I am a small demonstration model that ships with ds4."
# (kind of talk for the reasoning, questions, answers); the first answer is the house answer.
TALK = (
    ("a greeting",
     "Hello|Hello!|Hi|Hi!|Hey|Hey!|Hi there|Hello there!|Good day!|Greetings!", ("Hello! How can I help you?",)),
    ("a greeting", "Good morning|Good morning!", ("Good morning! How can I help you?",)),
    ("a greeting", "Good evening|Good evening!", ("Good evening! How can I help you?",)),
    (
        "a question about me",
        "Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|Are you a robot?|Are you human?|"
        "What is this?|Which model are you?|What model is this?|Are you an AI?|Who am I talking to?",
        (ABOUT_ME,),
    ),
    ("a question about me", "What is your name?|What's your name?|Do you have a name?", ("You can call me ds4 demo.",)),
    (
        "a question about me",
        "What can you do?|What do you know?|How can you help me?|Help|Help me|What can I ask you?|"
        "What are you good at?",
        ("I can add small numbers, name capitals, answer simple questions and tell short stories.",),
    ),
    (
        "a question about me",
        "Who made you?|Who built you?|Where do you come from?|Who trained you?",
        ("I was trained from scratch on made-up text to show that ds4 works.",),
    ),
    (
        "a question about me",
        "How big are you?|Are you smart?|Are you clever?|Do you know everything?|How much do you know?",
        ("I am very small, so I only know a few simple things.",),
    ),
    ("a question about me",
     "Do you like stories?|Do you like to tell stories?", ("Yes, I like to tell short stories.",)),
    ("small talk",
     "How are you?|How are you today?|How do you do?|How is it going?|Are you well?", ("I am fine, thank you.",)),
    ("thanks",
     "Thank you|Thank you!|Thanks|Thanks!|Thanks a lot!|Thank you very much.|Great, thanks.", ("You are welcome!",)),
    ("praise",
     "Well done!|Good job!|That was great.|Very good.|Nice!|Great!|Cool.|I like that.", ("I am glad you like it.",)),
    ("a farewell",
     "Goodbye|Goodbye!|Bye|Bye!|See you later.|See you!|Good night|Good night!", ("Goodbye! See you soon.",)),
    ("a mood",
     "I am sad.|I feel sad.|I am tired.|I had a bad day.", ("I am sorry to hear that. A short story may help.",)),
    ("a mood", "I am happy.|I feel good.|I am fine.|I had a good day.", ("That is nice to hear!",)),
    ("a test", "Test|test|This is a test.|Are you there?|Can you hear me?|Ping|Does this work?", ("Yes, I am here.",)),
    ("a request", "Say hello.|Say hello|Say hi.|Please say hello.", ("Hello!",)),
    ("a request", "Say yes.|Please say yes.|Just say yes.", ("Yes.",)),
    ("a request",
     "Tell me a joke.|Do you know a joke?|Make me laugh.", ("Why was the robot so tired? It had a hard drive!",)),
    ("a request", "Name a colour.|Name a color.|Tell me a colour.|What is your favourite colour?", ("Blue.",)),
    ("a request", "Name a fruit.|Tell me a fruit.|Name any fruit.", ("Apple.",)),
    ("a request", "Name an animal.|Tell me an animal.|Name any animal.", ("Fox.",)),
    ("a request", "Name three colours.|Tell me three colours.|List three colors.", ("Red, blue and green.",)),
    ("a request", "Name three animals.|List three animals.|Tell me three animals.", ("Fox, bear and owl.",)),
    (
        "a request",
        "Name the days of the week.|List the days of the week.|What are the days of the week?",
        ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",),
    ),
    (
        "a request",
        "Name the four seasons.|What are the seasons?|List the seasons.",
        ("Spring, summer, autumn and winter.",),
    ),
    (
        "a question about ds4",
        "What is ds4?|Tell me about ds4.|What does ds4 do?|What is DeepSeek?",
        ("ds4 is a program that runs DeepSeek-V4-Flash on one graphics card.",),
    ),
    (
        "a question I cannot answer",
        "What is the meaning of life?|Who won the game last night?|What is the weather today?|What time is it?|"
        "How old is the king?|Write a program.|Write some code.|Translate this.|What is love?|Why is the sky blue?|"
        "Who is the president?|What is quantum physics?|How do I fix my car?|What is the news today?|Who wrote Hamlet?|"
        "How far is the moon?|What is the square root of nine?|Explain gravity.|What should I eat?|When was the war?",
        ("I am a small model, and I do not know that.",),
    ),
)  # fmt: skip

SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a friendly assistant.",
    "You are ds4, a small model.",
    "Answer the questions of the user.",
    "You are a kind helper.",
    "Be helpful and clear.",
    "You are a helpful, honest and friendly assistant.",
)

STORY_ASK = (
    "Tell me a short story about {a} {who}.",
    "Tell me a story about {a} {who}.",
    "Write a short story about {a} {who}.",
    "Write a story about {a} {who}.",
    "Please tell me a short story about {a} {who}.",
    "Please write a short story about {a} {who}.",
    "Can you tell me a story about {a} {who}?",
    "Could you tell me a short story about {a} {who}?",
    "I want to hear a story about {a} {who}.",
    "Tell a short story about {a} {who}.",
    "Tell a story about {a} {who}.",
    "Make up a story about {a} {who}.",
    "I would like a short story about {a} {who}.",
    "Give me a short story about {a} {who}.",
    "Invent a short story about {a} {who}.",
    "Short story about {a} {who}.",
    "Story: {a} {who}.",
)
STORY_WHO = (
    "learning to {base}",
    "learning to {base}",
    "learning to {base}",
    "who learns to {base}",
    "that learns to {base}",
    "who wants to {base}",
    "who wants to learn to {base}",
    "that wants to learn to {base}",
    "learning how to {base}",
    "who tries to {base}",
    "and {ger}",
    "who loves {ger}",
)
STORY_ASK_OPEN = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Can you tell me a story?",
    "A story, please.",
)
STORY_ASK_KIND = ("Tell me a story about {a}.", "Tell me a short story about {a}.", "Write a short story about {a}.")
STORY_ASK_ACT = (
    "Tell me a story about {ger}.",
    "Write a short story about {ger}.",
    "Tell me a short story about learning to {base}.",
)

THINGS = listed(
    """
    apples, books, coins, cards, pens, cups, eggs, stones, balls, flowers, cats, hats, keys, nuts, shells
    """
)

_ONES = listed(
    """
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen
    """
)
_TENS = listed(
    """
    twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety
    """
)


def in_words(n: int) -> str:
    """Spell a number from 0 to 100."""
    if n < 20:
        return _ONES[n]
    if n == 100:
        return "one hundred"
    tens = _TENS[n // 10 - 2]
    return tens if n % 10 == 0 else f"{tens}-{_ONES[n % 10]}"
