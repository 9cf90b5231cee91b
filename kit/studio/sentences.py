"""What the voices say: short neutral sentences in several languages, and syllables of none."""

import numpy as np

# fmt: off
SENTENCES: dict[str, tuple[str, ...]] = {
    "en-us": (
        "The train leaves the station at half past nine.", "Bring the blue cup to the kitchen.",
        "We walked along the river until it got dark.", "My sister plays the piano on Sundays.",
        "There is a small garden behind the house.", "Could you open the window a little?",
        "The soup needs more salt and some pepper.", "Every morning the baker sings in his shop.",
        "A yellow boat is waiting near the bridge.", "I will call you again tomorrow evening.",
        "The old map shows a road over the hills.", "Rain is falling softly on the roof.",
        "They painted the door in bright green.", "Who left the umbrella under the table?",
        "Our teacher tells stories about the moon.",
    ),
    "de": (
        "Der Zug fährt heute von Gleis sieben ab.", "Im Garten blühen die ersten Tulpen.",
        "Kannst du mir bitte das Salz geben?", "Am Abend gehen wir oft am See spazieren.",
        "Meine Tante backt einen Kuchen mit Äpfeln.", "Die Katze schläft auf dem warmen Ofen.",
        "Morgen wird es regnen und stürmen.", "Er sucht seit Tagen seinen grünen Hut.",
        "Das Boot liegt ruhig im Hafen.", "Wir haben gestern lange telefoniert.",
        "Hinter dem Berg beginnt ein tiefer Wald.", "Sie liest jeden Abend ein Kapitel.",
        "Das Fenster steht den ganzen Tag offen.", "Wo hast du die Schlüssel hingelegt?",
        "Die Kinder bauen eine Burg aus Sand.",
    ),
    "fr-fr": (
        "Le bateau quitte le port avant midi.", "Ma voisine arrose ses fleurs le matin.",
        "Nous avons marché longtemps sous la pluie.", "Peux-tu fermer la porte, s'il te plaît ?",
        "Le pain est encore chaud et doré.", "Il y a un chat gris sur le mur.",
        "Demain, nous irons voir la mer.", "Elle chante une chanson très ancienne.",
        "Le train de nuit est toujours en retard.", "Mon frère répare un vieux vélo rouge.",
        "Les enfants dessinent des maisons bleues.", "Où as-tu trouvé cette petite clé ?",
        "La lune brille au-dessus du village.", "Je prends un café sans sucre.",
        "Un oiseau dort dans le grand arbre.",
    ),
    "es": (
        "El tren llega a la ciudad por la tarde.", "Mi abuela prepara una sopa muy rica.",
        "Vamos a caminar por la playa mañana.", "¿Puedes traer dos vasos de agua?",
        "La puerta verde está siempre abierta.", "El perro corre detrás de la pelota.",
        "Ayer compramos naranjas en el mercado.", "Ella escribe cartas todas las noches.",
        "Hay una fuente en medio de la plaza.", "El cielo está lleno de nubes blancas.",
        "Mi hermano toca la guitarra muy bien.", "¿Dónde dejaste el paraguas amarillo?",
        "Los niños juegan cerca del río.", "El café todavía está caliente.",
        "La montaña parece azul desde aquí.",
    ),
    "it": (
        "Il treno parte dal binario numero tre.", "La nonna prepara il pane ogni sabato.",
        "Domani andiamo a vedere il mare.", "Puoi aprire la finestra, per favore?",
        "Il gatto dorme sulla sedia rossa.", "Abbiamo camminato fino al vecchio ponte.",
        "Mia sorella legge un libro di viaggi.", "Il vento muove le foglie degli alberi.",
        "C'è un piccolo lago dietro la collina.", "Ieri sera abbiamo mangiato molto bene.",
        "La luna illumina tutta la piazza.", "Dove hai messo le chiavi di casa?",
        "I bambini disegnano una barca gialla.", "Il caffè è pronto sul tavolo.",
        "Un musicista suona davanti alla stazione.",
    ),
    "pt-br": (
        "O trem sai da estação às oito horas.", "Minha tia mora perto da praia.",
        "Vamos comprar frutas no mercado novo.", "Você pode fechar a janela, por favor?",
        "O cachorro dorme ao lado da porta.", "A chuva começou no fim da tarde.",
        "Meu irmão toca violão todos os dias.", "Há uma ponte velha sobre o rio.",
        "Ela pintou a casa de amarelo e branco.", "Amanhã teremos um dia de sol.",
        "O café está quente e muito doce.", "Onde você deixou o chapéu azul?",
        "As crianças correm pelo jardim.", "A lua aparece atrás da montanha.",
        "Um barco pequeno chega ao porto.",
    ),
    "nl": (
        "De trein vertrekt vanavond om acht uur.", "Mijn buurman heeft een grote tuin.",
        "Wil je de deur even dichtdoen?", "We fietsen morgen langs de rivier.",
        "De kat slaapt op een zachte stoel.", "Er ligt een boek op de tafel.",
        "Gisteren heeft het de hele dag geregend.", "Zij zingt een lied over de zee.",
        "Het brood is nog warm en vers.", "Achter het huis staat een oude boom.",
        "De kinderen bouwen een toren van hout.", "Waar heb je de sleutels neergelegd?",
        "De maan schijnt boven het dorp.", "Ik drink mijn koffie zonder suiker.",
        "Een gele boot vaart onder de brug.",
    ),
}
# fmt: on

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "")
_VOWELS = ("a", "e", "i", "o", "u")


def draw_syllables(random: np.random.Generator) -> str:
    """Make a string of invented words, such as `bamo lita sun`."""
    words = []
    for _ in range(random.integers(3, 7)):
        count = random.integers(1, 4)
        words.append("".join(_syllable(random) for _ in range(count)))
    return " ".join(words)


def _syllable(random: np.random.Generator) -> str:
    return _ONSETS[random.integers(len(_ONSETS))] + _VOWELS[random.integers(len(_VOWELS))]
