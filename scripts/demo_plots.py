"""Plots of the demonstration stories: each is a list of slots, and each slot a pool of sentences to draw from.

Fields: N and H are the names of the protagonist and the helper, kind and h what they are, base/ger/past/pp the
forms of the activity, tool and thing what it needs, fail/win/show/Tip sentences of the activity.
"""

from __future__ import annotations

OPENINGS = (
    "Once upon a time, {a} named {N} lived {place}.",
    "{Place} lived {a} named {N}.",
    "There was once {a} named {N} who lived {place}.",
    "{N} was {a} who lived {place}.",
    "Long ago, {a} named {N} had a home {place}.",
)
WISHES = (
    "More than anything, {N} wanted to learn to {base}.",
    "Every night the {kind} dreamed of {ger}.",
    "{N} had never {pp} before, but the {kind} longed to learn.",
    "One spring morning, the {kind} decided to learn to {base}.",
    "{N} had one big wish, and that was to learn to {base}.",
    "{He} thought about {ger} all day long.",
)
REASONS = (
    "It had all begun on market day, when {he} saw a stranger who {past} better than anyone.",
    "It looked like the happiest thing in the world.",
    "Nobody in the family had ever tried it, and that made it even more exciting.",
    '"If others can do it, then I can learn it too," {he} said.',
)
TIPS = (
    '"{Tip}," said {H}.',
    '{H} smiled and said, "{Tip}."',
    '"Do not worry," said {H}. "{Tip}."',
    '{H} thought for a while and said, "{Tip}."',
)
ENDINGS = (
    "From that day on, {ger} made the {kind} happy every single day.",
    "And whenever someone asked for the secret, {N} said that {ger} only takes time, patience and a good friend.",
    "That night the {kind} fell asleep with a smile and dreamed of {ger} again.",
    "{N} was still a {adj} {kind}, but now {he} was a {adj} {kind} who could {base}.",
    "The {kind} had learned to {base}, and {he} had also learned never to give up.",
    "To this day, people there speak of the {kind} who learned to {base}.",
)

PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "practice": (
        OPENINGS,
        WISHES,
        ("", *REASONS),
        (
            "So {he} found {tool} in an old shed and started at once.",
            "At the market {he} bought {tool} and ran home to try.",
            "A kind aunt gave {him} {tool} as a present.",
        ),
        ("The first try went badly.", "The beginning was harder than it looked.", "Nothing worked on the first day."),
        ("{fail}",),
        (
            "The {kind} sat down and sighed.",
            '"Perhaps a {kind} cannot {base}," {N} said in a small voice.',
            "For a moment, the {kind} thought about giving up.",
        ),
        (
            "Just then, {h} named {H} walked by and stopped.",
            "{H}, {h} who lived next door, heard the noise and came to see.",
            "That evening, {h} named {H} knocked on the door.",
        ),
        TIPS,
        (
            "The {kind} listened and tried again.",
            "{N} thanked {H} and practised every day after breakfast.",
            "So {N} tried it that way, slowly and with great care.",
        ),
        (
            "Little by little, the {kind} got better at {ger}.",
            "After one week, {ger} began to feel easy.",
            "Some days were hard, but the {kind} did not stop {ger}.",
        ),
        ("{win}",),
        ("{show}", "{H} clapped and called the whole street to come and see."),
        ENDINGS,
    ),
    "lost": (
        OPENINGS,
        WISHES,
        (
            "{He} owned {tool} and practised every day.",
            "For {his} birthday {he} was given {tool}, and the lessons began.",
        ),
        ("It was not easy at first.", "The first days were full of mistakes."),
        ("{fail}",),
        (
            "Then, one windy morning, the {thing} was gone.",
            "But one day the {kind} woke up and could not find the {thing}.",
        ),
        (
            "{N} looked under the bed, behind the door and in the garden.",
            "{He} searched every corner of the house, but found only dust.",
        ),
        (
            "Without it there could be no {ger}, and the {kind} was close to tears.",
            '"How can I ever learn to {base} now?" cried the {kind}.',
        ),
        ("{h_cap} named {H} offered to help.", "{H}, {h} from the next street, came to help with the search."),
        (
            "They asked the children at school, and they asked the geese by the pond.",
            "Together they walked from door to door until the sun was low.",
        ),
        ("At last {H} found the {thing} {found}.", "In the end, it was {H} who saw the {thing} {found}."),
        ('"Now I want to see you {base}," said {H}.', "{N} laughed with joy and hugged {H}."),
        ('{H} also gave {him} one piece of advice: "{Tip}."',),
        ("{win}",),
        (
            "Since then, the {kind} keeps the {thing} in a safe place, and {H} often comes to see {him} {base}.",
            "It was the best day the {kind} had ever had, because {ger} is more fun with a friend.",
        ),
    ),
    "show": (
        OPENINGS,
        WISHES,
        (
            "One day a sign in the square said that there would be a big show on Sunday.",
            "In May, the mayor invited everyone to a great summer show.",
        ),
        (
            '"I will show them that I can {base}," said {N}, but {his} voice was shaking.',
            "{N} wrote {his} name on the list and at once felt nervous.",
        ),
        ("The {kind} took {tool} and practised by the pond behind the house.", "With {tool}, the {kind} went to work."),
        ("{fail}",),
        (
            "The night before the show, {N} could not sleep.",
            '"What if they laugh at a {kind} who tries to {base}?" {he} asked the moon.',
        ),
        (
            "{H}, {h} from across the road, saw the light and sat down beside {him}.",
            "In the morning, {h} named {H} brought {him} a cup of warm milk.",
        ),
        TIPS,
        (
            "When the time came, the {kind} stood in front of the crowd with shaking knees.",
            "Soon it was time, and all eyes turned to the {kind}.",
        ),
        (
            "{N} looked for {H} in the crowd, took a deep breath and began.",
            "{He} closed {his} eyes, counted to three and began.",
        ),
        ("{win}",),
        ("{show}",),
        (
            "{N} did not win the first prize, but nobody was prouder than the {kind} who could {base}.",
            "The mayor shook hands with the {kind} and asked {him} to {base} again next year.",
            "After that, the {kind} was never afraid of {ger} in front of others again.",
        ),
    ),
    "gift": (
        OPENINGS,
        ("{His} best friend was {H}, {h}.", "{N} had one very good friend, {h} named {H}."),
        (
            "One winter, {H} was ill and had to stay in bed for many days.",
            "One day {H} hurt a foot and could not leave the house.",
        ),
        (
            '"I will learn to {base}, and that will cheer up my friend," said the {kind}.',
            "The {kind} wanted to give {H} some joy, so {he} decided to learn to {base}.",
        ),
        ("{He} borrowed {tool} and began.", "With {tool} in front of {him}, {N} made a start."),
        ("{fail}",),
        (
            "But the {kind} thought of {his} friend and did not stop.",
            "The {kind} shook {his} head, laughed a little and tried once more.",
        ),
        ('An old book about {ger} said, "{Tip}."', 'A voice on the radio gave good advice: "{Tip}."'),
        (
            "All week long, the {kind} was busy {ger} from morning to night.",
            "Day after day, {N} learned a little more about {ger}.",
        ),
        (
            'On Sunday, {N} went to see {H} and said, "I have a surprise for you."',
            "At last {N} felt ready and invited {H} to sit by the window.",
        ),
        ("{win}",),
        (
            "{H} laughed out loud for the first time in days.",
            "{H} forgot all the pain and asked for more.",
        ),
        (
            "{H} was soon well again, and the two friends still enjoy {ger} together.",
            "The {kind} had learned that {ger} is most fun when it makes a friend happy.",
            "It turned out that {ger} was the best medicine a {kind} could bring.",
        ),
    ),
    "journey": (
        OPENINGS,
        WISHES,
        (
            "Nobody at home could teach {him}, so the {kind} packed a bag and set out to find a teacher.",
            "There was no teacher nearby, so {N} put bread in a bag and left at sunrise.",
        ),
        (
            "{He} walked over three hills and across a long bridge.",
            "The road was long, and it rained for two days.",
        ),
        (
            "At the end of the road lived {H}, {h} who knew all about {ger}.",
            "On the third day {he} met {H}, {h} who was famous for {ger}.",
        ),
        (
            '"Please teach me to {base}," said the {kind}.',
            'The {kind} bowed and asked, "Can a {kind} learn to {base}?"',
        ),
        ("{H} nodded and brought {tool}.", '"We shall see," said {H} and handed {him} {tool}.'),
        ("{fail}",),
        ("{H} did not laugh.", "{H} only nodded, for every beginner makes mistakes."),
        TIPS,
        (
            "The {kind} stayed for a whole summer and worked hard.",
            "Weeks went by, and each lesson went a little better than the last.",
        ),
        (
            "When the leaves turned red, it was time to go home and show what {he} had learned.",
            "In autumn {N} said goodbye and walked home with a light heart.",
        ),
        ("{win}",),
        ("", "{show}"),
        (
            "Now the {kind} teaches {ger} to anyone who asks.",
            "Every year the {kind} sends {H} a letter about {ger}.",
            "The long road had been worth it, for now the {kind} could {base}.",
        ),
    ),
    "doubt": (
        OPENINGS,
        WISHES,
        (
            '"A {kind} who wants to {base}? What a silly idea!" said the neighbours.',
            "When the neighbours heard about it, they laughed at the {kind}.",
        ),
        ("Their words hurt, but {N} did not give up.", "{N} said nothing and went quietly home."),
        (
            "Each night {he} took {tool} to a lonely place by the water and practised alone.",
            "In secret, {he} got {tool} and practised behind the old mill.",
        ),
        ("{fail}",),
        (
            "Only {H}, {h}, knew about the secret lessons.",
            "One night {h} named {H} looked in and promised to keep the secret.",
        ),
        TIPS,
        (
            "Slowly, the {kind} understood what {ger} was about.",
            "A month later, the {kind} was {ger} without a single mistake.",
        ),
        (
            "Then came the village fair, and the band did not arrive.",
            "At the harvest feast, the music stopped and everyone was bored.",
        ),
        (
            'The {kind} stepped forward and said, "May I show you something?"',
            "{H} pushed {N} gently to the front.",
        ),
        ("{win}",),
        ("{show}", "For a moment it was silent, and then the cheering began."),
        (
            "The neighbours said they were sorry, and by winter half the village was {ger} with the {kind}.",
            "No one ever laughed at the {kind} for {ger} again.",
            '"I was wrong," said the oldest neighbour, "for this {kind} can really {base}."',
        ),
    ),
}
