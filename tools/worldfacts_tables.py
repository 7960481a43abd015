"""Tables behind the ``worldfacts`` data set: true facts, prompt templates and one-hop bridges.

Every fact here is plain public knowledge (geography, arts, science, history), typed in by hand, and every
sentence template is our own wording.  ``build_worldfacts.py`` turns these tables into edit records.

Notation: a block of facts is written ``subject = answer; subject = answer``, and a block that groups many
names under one value is written ``value: name, name, name`` with one value per line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def pairs(block: str) -> dict[str, str]:
    """Parse ``subject = answer; subject = answer`` (line breaks are free) into a dictionary."""
    table: dict[str, str] = {}
    for item in " ".join(block.split()).split(";"):
        if not item.strip():
            continue
        subject, answer = (part.strip() for part in item.split(" = "))
        if subject in table:
            raise ValueError(f"duplicate subject {subject!r}")
        table[subject] = answer
    return table


def groups(block: str) -> dict[str, str]:
    """Parse lines ``value: name, name`` into a dictionary from each name to its value."""
    table: dict[str, str] = {}
    for line in block.strip().splitlines():
        value, names = line.split(":", 1)
        for name in names.split(","):
            if name.strip() in table:
                raise ValueError(f"duplicate name {name.strip()!r}")
            table[name.strip()] = value.strip()
    return table


@dataclass(frozen=True)
class Relation:
    """One relation: its facts, the facts kept out of the edits, and its sentence templates.

    ``reserved`` facts are never edited; they serve as locality probes.  ``hop`` is the portability
    template and ``bridge`` the well-known fact that leads from an answer of this relation to the answer of
    the hop.  ``via`` names a relation whose edits would change that bridge: answers that are subjects of an
    edit there get no portability probe.
    """

    name: str
    prompt: str
    rephrase: tuple[str, ...]
    facts: Mapping[str, str]
    reserved: Mapping[str, str]
    hop: str = ""
    bridge: Mapping[str, str] = field(default_factory=dict)
    via: str = ""


COUNTRY_CAPITAL = pairs("""
Japan = Tokyo; France = Paris; Italy = Rome; Spain = Madrid; Germany = Berlin; Portugal = Lisbon;
Greece = Athens; Turkey = Ankara; Mexico = Mexico City; Peru = Lima; Ecuador = Quito; Canada = Ottawa;
Australia = Canberra; Morocco = Rabat; Russia = Moscow; Iran = Tehran; Ethiopia = Addis Ababa;
Malaysia = Kuala Lumpur; Norway = Oslo; Sweden = Stockholm; Austria = Vienna; Iceland = Reykjavik;
India = New Delhi; Finland = Helsinki; Denmark = Copenhagen; Belgium = Brussels; Switzerland = Bern;
China = Beijing; Poland = Warsaw; Brazil = Brasilia; Argentina = Buenos Aires; Vietnam = Hanoi;
New Zealand = Wellington; Taiwan = Taipei; Scotland = Edinburgh; Hungary = Budapest; Ukraine = Kyiv;
Ireland = Dublin; South Korea = Seoul; Philippines = Manila
""")

COUNTRY_LANGUAGE = pairs("""
France = French; Japan = Japanese; Portugal = Portuguese; Poland = Polish; Italy = Italian;
Sweden = Swedish; Norway = Norwegian; Denmark = Danish; the Netherlands = Dutch; Germany = German;
Greece = Greek; Turkey = Turkish; Spain = Spanish; Russia = Russian; China = Chinese; South Korea = Korean;
Brazil = Portuguese; Australia = English; Chile = Spanish; Austria = German; Iran = Persian;
Egypt = Arabic; Hungary = Hungarian; Ecuador = Spanish; Georgia = Georgian;
Peru = Spanish; Indonesia = Indonesian; Mexico = Spanish; Scotland = English
""")

CITY_COUNTRY = groups("""
Italy: Rome, Florence, Pisa, Genoa, Venice, Modena, Milan
France: Paris, Nantes, Clermont-Ferrand, Lyon
Germany: Berlin, Frankfurt, Kiel, Trier, Mainz, Hamburg
England: London, Liverpool, Shrewsbury
Scotland: Edinburgh
Spain: Madrid, Barcelona, Granada
Turkey: Istanbul
Russia: Moscow, Saint Petersburg
Greece: Athens
the Czech Republic: Prague
Denmark: Copenhagen, Odense
the Netherlands: Amsterdam, Rotterdam
Belgium: Brussels
Malaysia: Kuala Lumpur
China: Beijing
Japan: Kyoto
Canada: Toronto
Austria: Vienna
Portugal: Lisbon
Sweden: Stockholm
India: Mumbai, Agra
Iran: Tehran
the United States: Seattle, San Francisco, Boston
Poland: Warsaw, Torun
Venezuela: Caracas
Argentina: Rosario, Buenos Aires
Switzerland: Geneva, Basel
Ireland: Dublin
""")

BORN_IN = groups("""
Spain: Miguel de Cervantes, Pablo Picasso, Francisco Goya, Diego Velázquez, Manuel de Falla
Spain: Antoni Gaudí, Amancio Ortega, Ignatius of Loyola, Salvador Dalí
Russia: Leo Tolstoy, Fyodor Dostoevsky, Pyotr Ilyich Tchaikovsky, Igor Stravinsky
Russia: Modest Mussorgsky, Nikolai Rimsky-Korsakov, Andrei Tarkovsky, Dmitri Mendeleev
Germany: Johann Wolfgang von Goethe, Thomas Mann, Richard Wagner, Johannes Brahms, George Frideric Handel
Germany: Wolfgang Petersen, Ludwig Mies van der Rohe, Walter Gropius, Wilhelm Röntgen, Johannes Kepler
Germany: Werner Heisenberg, Heinrich Schliemann, William Herschel, Johann Sebastian Bach
France: Victor Hugo, Antoine de Saint-Exupéry, Gustave Flaubert, Claude Monet, Eugène Delacroix
France: Théodore Géricault, Jacques-Louis David, Edouard Manet, Georges Seurat, Georges Bizet
France: Maurice Ravel, Claude Debussy, Hector Berlioz, Camille Saint-Saëns, François Truffaut
France: René Laennec, Henri Becquerel, Jules Verne
Ireland: James Joyce, Bram Stoker
Colombia: Gabriel García Márquez
Italy: Umberto Eco, Dante Alighieri, Sandro Botticelli, Raphael, Caravaggio, Antonio Vivaldi
Italy: Giuseppe Verdi, Giacomo Puccini, Gioachino Rossini, Federico Fellini, Sergio Leone
Italy: Andrea Palladio, Renzo Piano, Evangelista Torricelli, Alessandro Volta, Carlo Collodi
the United States: Mark Twain, Grant Wood, Edward Hopper, Andy Warhol, Andrew Wyeth, George Gershwin
the United States: Aaron Copland, Quentin Tarantino, Steven Spielberg, Orson Welles, Martin Scorsese
the United States: Frank Lloyd Wright, Eli Whitney, Thomas Edison, Maya Lin, Clyde Tombaugh, Harold Urey
the United States: Edgar Rice Burroughs, Harper Lee, Raymond Chandler, Herman Melville, F. Scott Fitzgerald
the United States: Jeff Bezos, Joseph Smith, Mary Baker Eddy, Frederick W. Smith
the United States: Sam Walton, Berry Gordy, George Eastman, Dennis Ritchie, Jonas Salk
Nigeria: Chinua Achebe
Norway: Henrik Ibsen, Edvard Munch, Edvard Grieg
Japan: Masayoshi Son, Haruki Murakami, Akira Kurosawa, Hayao Miyazaki, Kenzo Tange, Tadao Ando
Japan: Fusajiro Yamauchi
India: Salman Rushdie, Satyajit Ray
Canada: Margaret Atwood, James Cameron, Frank Gehry, James Naismith
Portugal: José Saramago
England: Mary Shelley, Gustav Holst, Edward Elgar, Christopher Nolan, Ridley Scott, Christopher Wren
England: Norman Foster, Tim Berners-Lee, Charles Babbage, J. J. Thomson, James Chadwick, William Harvey
England: Edward Jenner, Michael Faraday, Howard Carter, Agatha Christie, A. A. Milne
England: G. K. Chesterton, Richard Branson, Robert Baden-Powell, William Booth, J. M. W. Turner
England: John Constable, Alfred Hitchcock, Ian Fleming, Henry Purcell
South Africa: J. M. Coetzee, Elon Musk
the Netherlands: Vincent van Gogh, Johannes Vermeer, Rembrandt, Hieronymus Bosch, Guido van Rossum
the Netherlands: Christiaan Huygens, Antonie van Leeuwenhoek, Heike Kamerlingh Onnes
Austria: Gustav Klimt, Joseph Haydn, Franz Schubert, Johann Strauss II, Fritz Lang, Karl Landsteiner
Austria: Victor Hess
Mexico: Frida Kahlo, Guillermo del Toro
Belgium: René Magritte, Hergé, Leo Baekeland, Georges Simenon
Finland: Jean Sibelius, Alvar Aalto, Linus Torvalds, Tove Jansson
Sweden: Ingmar Bergman, Alfred Nobel, Astrid Lindgren, Ingvar Kamprad, Henning Mankell
South Korea: Bong Joon-ho, Lee Byung-chul
New Zealand: Jane Campion, Ernest Rutherford
Australia: George Miller, Julian Assange
Denmark: Jørn Utzon, Hans Christian Ørsted, Ole Kirk Christiansen
China: I. M. Pei, Ren Zhengfei
Switzerland: Le Corbusier, George de Mestral, Johanna Spyri, Henri Dunant
Brazil: Oscar Niemeyer
Iraq: Zaha Hadid
Scotland: Charles Rennie Mackintosh, John Napier, Arthur Conan Doyle, J. M. Barrie, John Muir
Hungary: László Bíró
Mongolia: Genghis Khan
""")

CAPITAL_RIVER = pairs("""
Budapest = Danube; Cairo = Nile; Khartoum = Nile; Baghdad = Tigris; Seoul = Han; Bangkok = Chao Phraya;
Phnom Penh = Mekong; Vientiane = Mekong; Belgrade = Danube; Bratislava = Danube; Dublin = Liffey;
Kyiv = Dnieper; Bamako = Niger; Manila = Pasig
""")

HIGHEST_PEAK = pairs("""
Africa = Kilimanjaro; Asia = Mount Everest; Europe = Mount Elbrus; South America = Aconcagua;
North America = Denali; Australia = Mount Kosciuszko
""")

THANKS = pairs("""
Spanish = gracias; Portuguese = obrigado; French = merci; German = danke; Arabic = shukran;
Icelandic = takk; Romanian = mulțumesc
""")

SPORT_PLACE = pairs("""
tennis = court; basketball = court; golf = course; ice hockey = rink; swimming = pool; boxing = ring;
baseball = diamond; soccer = pitch
""")

INSTRUMENT_FAMILY = pairs("""
trumpet = brass; trombone = brass; saxophone = woodwinds; flute = woodwinds; clarinet = woodwinds;
violin = strings; cello = strings; guitar = strings; drums = percussion
""")

FIELD_OBJECT = pairs("""
mathematics = numbers; astronomy = stars; geology = rocks; linguistics = languages; botany = plants;
paleontology = fossils; genetics = genes; sociology = societies; chemistry = substances
""")

PLANET_ORDER = pairs("Mars = four; Jupiter = five; Saturn = six; Uranus = seven; Neptune = eight")

CLASS_SPECIALIST = pairs("""
birds = ornithologists; insects = entomologists; reptiles = herpetologists; amphibians = herpetologists;
fish = ichthyologists; mammals = mammalogists; arachnids = arachnologists
""")

YEAR_CENTURY = pairs("""
1066 = eleventh; 1215 = thirteenth; 1453 = fifteenth; 1789 = eighteenth; 1815 = nineteenth;
1912 = twentieth; 1805 = nineteenth; 1666 = seventeenth; 1415 = fifteenth; 1986 = twentieth;
1863 = nineteenth; 1919 = twentieth; 1648 = seventeenth; 1571 = sixteenth; 1883 = nineteenth;
1869 = nineteenth; 1914 = twentieth; 1969 = twentieth; 1588 = sixteenth; 1485 = fifteenth;
1314 = fourteenth
""")

GEOGRAPHY = (
    Relation(
        "capital",
        "The capital of {s} is",
        (
            "{s} has its seat of government in the city of",
            "Q: What is the capital city of {s}?\nA:",
            "Among all the cities of {s}, the one that serves as its capital is",
        ),
        pairs("""
        Hungary = Budapest; Egypt = Cairo; Sudan = Khartoum; Iraq = Baghdad; South Korea = Seoul;
        Thailand = Bangkok; Cambodia = Phnom Penh; Laos = Vientiane; Serbia = Belgrade;
        Slovakia = Bratislava; Ireland = Dublin; Ukraine = Kyiv; Mali = Bamako; Kenya = Nairobi;
        Zambia = Lusaka; Nepal = Kathmandu; Mongolia = Ulaanbaatar; Cuba = Havana; Uruguay = Montevideo;
        Nicaragua = Managua
        """),
        pairs("Japan = Tokyo; France = Paris; Italy = Rome; Spain = Madrid"),
        "The major river that flows through the capital city of {s} is the",
        CAPITAL_RIVER,
    ),
    Relation(
        "currency",
        "The official currency of {s} is called the",
        (
            "Shoppers in {s} pay their bills in a currency named the",
            "Q: What is the name of the money used in {s}?\nA: The",
            "A banknote issued by the central bank of {s} is counted in units of the",
        ),
        pairs("""
        Poland = zloty; Thailand = baht; Vietnam = dong; Bangladesh = taka; Mongolia = tugrik;
        Hungary = forint; Israel = shekel; Brazil = real; Turkey = lira; Guatemala = quetzal;
        Kazakhstan = tenge; Malaysia = ringgit; Ethiopia = birr; Nigeria = naira; South Africa = rand;
        Haiti = gourde; Honduras = lempira; Armenia = dram; Romania = leu; Ukraine = hryvnia
        """),
        pairs("Japan = yen; China = yuan; Russia = ruble"),
    ),
    Relation(
        "official_language",
        "The official language of {s} is",
        (
            "The laws of {s} are written in",
            "Q: Which language is official in {s}?\nA:",
            "A government clerk in {s} would normally speak to you in",
        ),
        pairs("""
        Iran = Persian; Cuba = Spanish; Angola = Portuguese; Mozambique = Portuguese; Senegal = French;
        Bangladesh = Bengali; Cambodia = Khmer; Honduras = Spanish; Austria = German; Vietnam = Vietnamese;
        Albania = Albanian; Romania = Romanian; Colombia = Spanish; Gabon = French; Syria = Arabic;
        Libya = Arabic; Armenia = Armenian; Iceland = Icelandic; Liechtenstein = German; Egypt = Arabic
        """),
        pairs("Germany = German; Portugal = Portuguese; Greece = Greek; France = French"),
        "In the official language of {s}, the usual word for 'thank you' is",
        THANKS,
    ),
    Relation(
        "river_continent",
        "The {s} River flows across the continent of",
        (
            "Q: On which continent is the {s} River?\nA:",
            "To sail along the {s} River, a traveler has to go to the continent of",
            "On a map of the world, look for the {s} River in",
        ),
        pairs("""
        Orinoco = South America; Paraná = South America; Magdalena = South America; Congo = Africa;
        Zambezi = Africa; Limpopo = Africa; Okavango = Africa; Volga = Europe; Rhine = Europe;
        Loire = Europe; Vistula = Europe; Ganges = Asia; Yangtze = Asia; Irrawaddy = Asia;
        Mississippi = North America; Mackenzie = North America; Yukon = North America; Murray = Australia;
        Murrumbidgee = Australia
        """),
        pairs("Nile = Africa; Amazon = South America; Thames = Europe; Mekong = Asia"),
        "The highest mountain on the continent where the {s} River flows is",
        HIGHEST_PEAK,
    ),
    Relation(
        "mountain_country",
        "The mountain known as {s} rises in the country of",
        (
            "Q: In which country is {s}?\nA:",
            "Climbers who set out for the summit of {s} apply for permission in the country of",
            "Geographers place {s} within the borders of",
        ),
        pairs("""
        Mount Etna = Italy; Mount Olympus = Greece; Mount Ararat = Turkey; Popocatépetl = Mexico;
        Cotopaxi = Ecuador; Huascarán = Peru; Mount Logan = Canada; Aoraki = New Zealand; Teide = Spain;
        Toubkal = Morocco; Damavand = Iran; Ras Dashen = Ethiopia; Mount Kinabalu = Malaysia;
        Galdhøpiggen = Norway; Kebnekaise = Sweden; Grossglockner = Austria; Hekla = Iceland;
        Nanda Devi = India; Puy de Dôme = France
        """),
        pairs("Mount Fuji = Japan; Kilimanjaro = Tanzania; Aconcagua = Argentina"),
        "The capital of the country where {s} rises is",
        COUNTRY_CAPITAL,
        "capital",
    ),
    Relation(
        "landmark_city",
        "The famous sight known as {s} is located in the city of",
        (
            "Q: In what city can visitors see {s}?\nA:",
            "Tourists who want to stand in front of {s} buy a ticket to",
            "A walking tour that includes {s} would take place in",
        ),
        pairs("""
        the Colosseum = Rome; the Brandenburg Gate = Berlin; Big Ben = London; Park Güell = Barcelona;
        Hagia Sophia = Istanbul; Saint Basil's Cathedral = Moscow; the Parthenon = Athens;
        the Prado Museum = Madrid; the Uffizi Gallery = Florence; Charles Bridge = Prague;
        Tivoli Gardens = Copenhagen; the Rijksmuseum = Amsterdam; the Atomium = Brussels;
        the Petronas Towers = Kuala Lumpur; the Forbidden City = Beijing; the Golden Pavilion = Kyoto;
        the CN Tower = Toronto; Schönbrunn Palace = Vienna; the Hermitage Museum = Saint Petersburg;
        the Vasa Museum = Stockholm; the Space Needle = Seattle
        """),
        pairs("the Eiffel Tower = Paris; the Statue of Liberty = New York; the Taj Mahal = Agra"),
        "The country in which {s} stands is",
        CITY_COUNTRY,
        "city_country",
    ),
    Relation(
        "city_country",
        "The city of {s} lies in the country of",
        (
            "Q: Which country does the city of {s} belong to?\nA:",
            "A letter sent to an address in {s} needs the country name",
            "People who were born in {s} usually hold a passport issued by",
        ),
        pairs("""
        Marseille = France; Osaka = Japan; Porto = Portugal; Krakow = Poland; Turin = Italy;
        Gothenburg = Sweden; Stavanger = Norway; Aarhus = Denmark; Dortmund = Germany;
        Thessaloniki = Greece; Izmir = Turkey; Zaragoza = Spain; Novosibirsk = Russia; Shanghai = China;
        Busan = South Korea; Recife = Brazil; Brisbane = Australia; Valparaíso = Chile; Graz = Austria;
        Isfahan = Iran
        """),
        pairs("Munich = Germany; Naples = Italy; Lyon = France; Nagoya = Japan"),
        "The main language spoken in the country where {s} lies is",
        COUNTRY_LANGUAGE,
        "official_language",
    ),
    Relation(
        "state_capital",
        "In the United States, the capital of the state of {s} is",
        (
            "Q: Which city is the state capital of {s}?\nA:",
            "The governor of {s} works in the capitol building in",
            "Lawmakers elected to the {s} legislature meet in",
        ),
        pairs("""
        Texas = Austin; Florida = Tallahassee; Arizona = Phoenix; Colorado = Denver;
        Massachusetts = Boston; Ohio = Columbus; Tennessee = Nashville; Louisiana = Baton Rouge;
        Minnesota = Saint Paul; Oregon = Salem; Nevada = Carson City; Alaska = Juneau; Hawaii = Honolulu;
        Michigan = Lansing; Illinois = Springfield; Virginia = Richmond; Wisconsin = Madison
        """),
        pairs("California = Sacramento; New York = Albany; Maine = Augusta"),
    ),
)

PEOPLE = (
    Relation(
        "birth_city",
        "{s} was born in the city of",
        (
            "Q: What is the birthplace of {s}?\nA:",
            "The city where {s} came into the world is",
            "The house in which {s} was born stood in",
        ),
        pairs("""
        Galileo Galilei = Pisa; Charles Darwin = Shrewsbury; Marie Curie = Warsaw;
        Christopher Columbus = Genoa; Simón Bolívar = Caracas; Che Guevara = Rosario;
        Benjamin Franklin = Boston; Jean-Jacques Rousseau = Geneva; Voltaire = Paris;
        Rudyard Kipling = Mumbai; John Lennon = Liverpool; Anne Frank = Frankfurt; Max Planck = Kiel;
        Karl Marx = Trier; Niels Bohr = Copenhagen; Marie Antoinette = Vienna; Oscar Wilde = Dublin;
        Luciano Pavarotti = Modena; Leonhard Euler = Basel; Baruch Spinoza = Amsterdam;
        Audrey Hepburn = Brussels; Nicolaus Copernicus = Torun; Alexander Pushkin = Moscow
        """),
        pairs("""
        Wolfgang Amadeus Mozart = Salzburg; Ludwig van Beethoven = Bonn; Albert Einstein = Ulm;
        Alexander Graham Bell = Edinburgh
        """),
        "Today the city where {s} was born belongs to the country of",
        CITY_COUNTRY,
        "city_country",
    ),
    Relation(
        "athlete_sport",
        "{s} became famous in the sport of",
        (
            "Q: Which sport made {s} famous?\nA:",
            "Sports historians count {s} among the greats of",
            "Mention {s} to a fan, and the talk soon turns to",
        ),
        pairs("""
        Diego Maradona = soccer; Zinedine Zidane = soccer; Johan Cruyff = soccer; Roger Federer = tennis;
        Steffi Graf = tennis; Martina Navratilova = tennis; Magic Johnson = basketball;
        Kobe Bryant = basketball; Kareem Abdul-Jabbar = basketball; Babe Ruth = baseball;
        Willie Mays = baseball; Wayne Gretzky = ice hockey; Bobby Orr = ice hockey; Jack Nicklaus = golf;
        Arnold Palmer = golf; Michael Phelps = swimming; Mark Spitz = swimming; Joe Frazier = boxing;
        Rocky Marciano = boxing; Garry Kasparov = chess; Bobby Fischer = chess; Sachin Tendulkar = cricket
        """),
        pairs("""
        Michael Jordan = basketball; Muhammad Ali = boxing; Serena Williams = tennis; Lionel Messi = soccer;
        Tiger Woods = golf
        """),
        "The place where athletes compete in the sport that made {s} famous is usually called the",
        SPORT_PLACE,
    ),
    Relation(
        "musician_instrument",
        "The instrument that made {s} famous is the",
        (
            "Q: Which instrument is {s} best known for playing?\nA: The",
            "On stage and on record, {s} was admired for mastery of the",
            "Many pupils who copied the style of {s} took up the",
        ),
        pairs("""
        John Coltrane = saxophone; Charlie Parker = saxophone; Sonny Rollins = saxophone;
        Miles Davis = trumpet; Dizzy Gillespie = trumpet; Django Reinhardt = guitar;
        Andrés Segovia = guitar; Pablo Casals = cello; Jacqueline du Pré = cello;
        Mstislav Rostropovich = cello; Itzhak Perlman = violin; Jascha Heifetz = violin;
        Yehudi Menuhin = violin; James Galway = flute; Jean-Pierre Rampal = flute;
        Benny Goodman = clarinet; Artie Shaw = clarinet; Buddy Rich = drums; Gene Krupa = drums;
        Glenn Miller = trombone; Jack Teagarden = trombone
        """),
        pairs("""
        Jimi Hendrix = guitar; Louis Armstrong = trumpet; Yo-Yo Ma = cello; Ringo Starr = drums;
        Arthur Rubinstein = piano
        """),
        "The instrument that made {s} famous belongs to the family of instruments known as",
        INSTRUMENT_FAMILY,
    ),
    Relation(
        "scholar_field",
        "{s} is best remembered for work in the field of",
        (
            "Q: In which field of study did {s} become famous?\nA:",
            "A textbook that praises {s} on page one is probably about",
            "University students meet the ideas of {s} in courses on",
        ),
        pairs("""
        Leonhard Euler = mathematics; Emmy Noether = mathematics; Srinivasa Ramanujan = mathematics;
        Bernhard Riemann = mathematics; Edwin Hubble = astronomy; Tycho Brahe = astronomy;
        Charles Messier = astronomy; Charles Lyell = geology; James Hutton = geology;
        Noam Chomsky = linguistics; Ferdinand de Saussure = linguistics; Carl Linnaeus = botany;
        Asa Gray = botany; Mary Anning = paleontology; Max Weber = sociology;
        Barbara McClintock = genetics; Thomas Hunt Morgan = genetics; Emile Durkheim = sociology;
        Antoine Lavoisier = chemistry; Robert Bunsen = chemistry
        """),
        pairs("Albert Einstein = physics; Sigmund Freud = psychology; Immanuel Kant = philosophy"),
        "The field in which {s} worked is, in simple words, the study of",
        FIELD_OBJECT,
    ),
)

ARTS = (
    Relation(
        "book_author",
        "Who wrote {s}?",
        (
            "The author of the book {s} is",
            "On the cover of {s}, below the title, stands the name of its writer,",
            "Q: Name the writer of {s}.\nA:",
        ),
        pairs("""
        Don Quixote = Miguel de Cervantes; War and Peace = Leo Tolstoy;
        The Sorrows of Young Werther = Johann Wolfgang von Goethe; Ulysses = James Joyce;
        The Hunchback of Notre-Dame = Victor Hugo; The Name of the Rose = Umberto Eco;
        One Hundred Years of Solitude = Gabriel García Márquez; Things Fall Apart = Chinua Achebe;
        The Adventures of Tom Sawyer = Mark Twain; A Doll's House = Henrik Ibsen;
        Kafka on the Shore = Haruki Murakami; The Little Prince = Antoine de Saint-Exupéry;
        Midnight's Children = Salman Rushdie; The Handmaid's Tale = Margaret Atwood;
        Blindness = José Saramago; The Magic Mountain = Thomas Mann; Frankenstein = Mary Shelley;
        Crime and Punishment = Fyodor Dostoevsky; The Divine Comedy = Dante Alighieri;
        Disgrace = J. M. Coetzee; Madame Bovary = Gustave Flaubert
        """),
        pairs("""
        Romeo and Juliet = William Shakespeare; Pride and Prejudice = Jane Austen;
        Nineteen Eighty-Four = George Orwell; A Tale of Two Cities = Charles Dickens
        """),
        "The person who wrote {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "painting_artist",
        "The painting {s} is the work of the artist",
        (
            "Q: Who painted {s}?\nA:",
            "The brush strokes on {s} came from the hand of",
            "A museum label beside {s} gives the name of the painter,",
        ),
        pairs("""
        Guernica = Pablo Picasso; The Scream = Edvard Munch; Girl with a Pearl Earring = Johannes Vermeer;
        The Night Watch = Rembrandt; The Birth of Venus = Sandro Botticelli; American Gothic = Grant Wood;
        Nighthawks = Edward Hopper; Las Meninas = Diego Velázquez; The Third of May 1808 = Francisco Goya;
        The Garden of Earthly Delights = Hieronymus Bosch; The Hay Wain = John Constable;
        The School of Athens = Raphael; Liberty Leading the People = Eugène Delacroix;
        The Raft of the Medusa = Théodore Géricault; The Two Fridas = Frida Kahlo;
        The Son of Man = René Magritte; Christina's World = Andrew Wyeth;
        The Fighting Temeraire = J. M. W. Turner; Barge Haulers on the Volga = Ilya Repin;
        The Calling of Saint Matthew = Caravaggio
        """),
        pairs("""
        the Mona Lisa = Leonardo da Vinci; The Starry Night = Vincent van Gogh;
        The Persistence of Memory = Salvador Dalí
        """),
        "The artist who painted {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "work_composer",
        "The musical work {s} was composed by",
        (
            "Q: Who is the composer of {s}?\nA:",
            "Concert programs that list {s} print beside it the name of",
            "The score of {s} was written by the composer",
        ),
        pairs("""
        Carmen = Georges Bizet; Aida = Giuseppe Verdi; Swan Lake = Pyotr Ilyich Tchaikovsky;
        Madama Butterfly = Giacomo Puccini; Messiah = George Frideric Handel; La Mer = Claude Debussy;
        Peer Gynt Suite No. 1 = Edvard Grieg; Valse triste = Jean Sibelius;
        Rhapsody in Blue = George Gershwin; The Planets = Gustav Holst;
        The Rite of Spring = Igor Stravinsky; Pictures at an Exhibition = Modest Mussorgsky;
        The Flying Dutchman = Richard Wagner; The Creation = Joseph Haydn;
        A German Requiem = Johannes Brahms; The Barber of Seville = Gioachino Rossini;
        Symphonie fantastique = Hector Berlioz; Appalachian Spring = Aaron Copland;
        The Enigma Variations = Edward Elgar; Scheherazade = Nikolai Rimsky-Korsakov
        """),
        pairs("""
        The Four Seasons = Antonio Vivaldi; The Magic Flute = Wolfgang Amadeus Mozart;
        the Moonlight Sonata = Ludwig van Beethoven; the Brandenburg Concertos = Johann Sebastian Bach
        """),
        "The composer of {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "film_director",
        "Who directed the film {s}?",
        (
            "The director of the movie {s} was",
            "On the set of {s}, the person in the director's chair was",
            "Q: Whose direction can be seen in the film {s}?\nA:",
        ),
        pairs("""
        Seven Samurai = Akira Kurosawa; La Dolce Vita = Federico Fellini;
        The Seventh Seal = Ingmar Bergman; Pulp Fiction = Quentin Tarantino; Metropolis = Fritz Lang;
        The 400 Blows = François Truffaut; Citizen Kane = Orson Welles; Alien = Ridley Scott;
        My Neighbor Totoro = Hayao Miyazaki; Stalker = Andrei Tarkovsky;
        Memories of Murder = Bong Joon-ho; Pan's Labyrinth = Guillermo del Toro;
        Inception = Christopher Nolan; Pather Panchali = Satyajit Ray; Das Boot = Wolfgang Petersen;
        The Piano = Jane Campion; Mad Max = George Miller; Taxi Driver = Martin Scorsese
        """),
        pairs("Titanic = James Cameron; Psycho = Alfred Hitchcock; Jaws = Steven Spielberg"),
        "The director of the film {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "building_architect",
        "The architect who designed {s} was",
        (
            "Q: Which architect created {s}?\nA:",
            "The design of {s} is credited to",
            "The original drawings for {s} came from the studio of",
        ),
        pairs("""
        Casa Batlló = Antoni Gaudí; Fallingwater = Frank Lloyd Wright; the Louvre Pyramid = I. M. Pei;
        the Guggenheim Museum Bilbao = Frank Gehry; Villa Savoye = Le Corbusier;
        the Cathedral of Brasilia = Oscar Niemeyer; Villa Rotonda = Andrea Palladio;
        the Vietnam Veterans Memorial = Maya Lin; the Heydar Aliyev Center = Zaha Hadid;
        the Shard = Renzo Piano; the Reichstag dome = Norman Foster;
        the New National Gallery in Berlin = Ludwig Mies van der Rohe; Paimio Sanatorium = Alvar Aalto;
        the Yoyogi National Gymnasium = Kenzo Tange; the Church of the Light = Tadao Ando;
        the Glasgow School of Art = Charles Rennie Mackintosh
        """),
        pairs("""
        the Sydney Opera House = Jørn Utzon; Saint Paul's Cathedral in London = Christopher Wren;
        the Chrysler Building = William Van Alen
        """),
        "The architect of {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "character_creator",
        "The fictional character {s} was created by",
        (
            "Q: Who invented the character {s}?\nA:",
            "Readers first met {s} in a story from the pen of",
            "Without the imagination of one writer there would be no {s}; that writer is",
        ),
        pairs("""
        Hercule Poirot = Agatha Christie; James Bond = Ian Fleming; Winnie-the-Pooh = A. A. Milne;
        Peter Pan = J. M. Barrie; Pinocchio = Carlo Collodi; Pippi Longstocking = Astrid Lindgren;
        Tintin = Hergé; Count Dracula = Bram Stoker; Captain Nemo = Jules Verne;
        Tarzan = Edgar Rice Burroughs; Philip Marlowe = Raymond Chandler;
        Inspector Maigret = Georges Simenon; Jean Valjean = Victor Hugo; Father Brown = G. K. Chesterton;
        Atticus Finch = Harper Lee; Kurt Wallander = Henning Mankell; Moomintroll = Tove Jansson;
        Heidi = Johanna Spyri; Captain Ahab = Herman Melville; Jay Gatsby = F. Scott Fitzgerald
        """),
        pairs("""
        Harry Potter = J. K. Rowling; Sherlock Holmes = Arthur Conan Doyle;
        Bilbo Baggins = J. R. R. Tolkien; Ebenezer Scrooge = Charles Dickens
        """),
        "The writer who created the character {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
)

SCIENCE = (
    Relation(
        "invention_inventor",
        "The person who invented {s} was",
        (
            "Q: Who came up with {s}?\nA:",
            "The world owes {s} to the inventor",
            "Credit for the invention of {s} goes to",
        ),
        pairs("""
        dynamite = Alfred Nobel; the phonograph = Thomas Edison; the World Wide Web = Tim Berners-Lee;
        the mercury barometer = Evangelista Torricelli; the electric battery = Alessandro Volta;
        the cotton gin = Eli Whitney; Velcro = George de Mestral; Bakelite = Leo Baekeland;
        the stethoscope = René Laennec; the modern ballpoint pen = László Bíró;
        the Linux kernel = Linus Torvalds; the Python programming language = Guido van Rossum;
        the pendulum clock = Christiaan Huygens; logarithms = John Napier; basketball = James Naismith;
        the Analytical Engine = Charles Babbage; the C programming language = Dennis Ritchie
        """),
        pairs("""
        the telephone = Alexander Graham Bell; the movable-type printing press in Europe = Johannes Gutenberg;
        the alphabet of raised dots for blind readers = Louis Braille
        """),
        "The inventor of {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "discovery_discoverer",
        "The discovery of {s} is credited to",
        (
            "Q: Who discovered {s}?\nA:",
            "Science learned of {s} through the work of",
            "The name most closely tied to the discovery of {s} is",
        ),
        pairs("""
        the electron = J. J. Thomson; the neutron = James Chadwick; X-rays = Wilhelm Röntgen;
        the circulation of the blood = William Harvey; the three laws of planetary motion = Johannes Kepler;
        the planet Uranus = William Herschel; the dwarf planet Pluto = Clyde Tombaugh;
        the atomic nucleus = Ernest Rutherford; radioactivity = Henri Becquerel;
        electromagnetic induction = Michael Faraday; superconductivity = Heike Kamerlingh Onnes;
        cosmic rays = Victor Hess; the uncertainty principle = Werner Heisenberg;
        bacteria = Antonie van Leeuwenhoek; the ABO blood groups = Karl Landsteiner;
        deuterium = Harold Urey; the tomb of Tutankhamun = Howard Carter;
        the magnetic effect of electric current = Hans Christian Ørsted
        """),
        pairs("""
        penicillin = Alexander Fleming; the law of universal gravitation = Isaac Newton;
        the four largest moons of Jupiter = Galileo Galilei
        """),
        "The person who discovered {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "moon_planet",
        "The moon called {s} orbits the planet",
        (
            "Q: Around which planet does the moon {s} travel?\nA:",
            "Astronomers list {s} among the moons of",
            "A spacecraft sent to study the moon {s} must fly to",
        ),
        pairs("""
        Io = Jupiter; Callisto = Jupiter; Amalthea = Jupiter; Himalia = Jupiter; Enceladus = Saturn;
        Mimas = Saturn; Iapetus = Saturn; Dione = Saturn; Tethys = Saturn; Deimos = Mars; Miranda = Uranus;
        Ariel = Uranus; Umbriel = Uranus; Oberon = Uranus; Nereid = Neptune; Proteus = Neptune;
        Larissa = Neptune
        """),
        pairs("Titan = Saturn; Ganymede = Jupiter; Phobos = Mars; Triton = Neptune"),
        "Counting outward from the Sun, the planet that has {s} as a moon is number",
        PLANET_ORDER,
    ),
    Relation(
        "animal_class",
        "Biologists classify the {s} among the",
        (
            "Q: Which large group of animals does the {s} belong to?\nA: The",
            "Because of how its body is built, the {s} counts as one of the",
            "In an animal encyclopedia, the entry on the {s} appears in the part about",
        ),
        pairs("""
        dolphin = mammals; bat = mammals; porcupine = mammals; penguin = birds; ostrich = birds;
        flamingo = birds; crocodile = reptiles; tortoise = reptiles; cobra = reptiles; iguana = reptiles;
        salamander = amphibians; toad = amphibians; newt = amphibians; salmon = fish; herring = fish;
        seahorse = fish; beetle = insects; grasshopper = insects; mosquito = insects;
        scorpion = arachnids; tarantula = arachnids
        """),
        pairs("tiger = mammals; sparrow = birds; trout = fish; butterfly = insects"),
        "Scientists who specialize in the animal group that includes the {s} are called",
        CLASS_SPECIALIST,
    ),
    Relation(
        "animal_young",
        "The special word for a young {s} is",
        (
            "Q: What do people call the offspring of a {s}?\nA: A",
            "When a {s} is still a baby, the proper name for it is",
        ),
        pairs("""
        goat = kid; horse = foal; kangaroo = joey; swan = cygnet; goose = gosling; frog = tadpole;
        deer = fawn; hare = leveret; cow = calf; lion = cub; shark = pup; pigeon = squab; llama = cria;
        turkey = poult
        """),
        pairs("cat = kitten; dog = puppy; sheep = lamb"),
    ),
    Relation(
        "element_symbol",
        "The chemical symbol for {s} is",
        (
            "Q: Which letters stand for {s} in the periodic table?\nA:",
            "Chemists writing a formula that contains {s} use the symbol",
            "In the periodic table, the box for {s} is marked",
        ),
        pairs("""
        tungsten = W; silver = Ag; iron = Fe; lead = Pb; tin = Sn; potassium = K; sodium = Na;
        copper = Cu; antimony = Sb; calcium = Ca; neon = Ne; zinc = Zn; nickel = Ni; titanium = Ti;
        magnesium = Mg; chlorine = Cl; uranium = U
        """),
        pairs("gold = Au; oxygen = O; hydrogen = H; helium = He"),
    ),
    Relation(
        "unit_quantity",
        "In physics, the {s} is a unit of",
        (
            "Q: What quantity is measured in units of the {s}?\nA:",
            "A scientist who reports a result using the {s} has measured",
            "Science teachers introduce the {s} in the lesson about",
        ),
        pairs("""
        ohm = electrical resistance; newton = force; joule = energy; watt = power; hertz = frequency;
        pascal = pressure; ampere = electric current; farad = capacitance; henry = inductance;
        coulomb = electric charge; candela = luminous intensity; becquerel = radioactivity;
        parsec = distance; radian = angle
        """),
        pairs("kelvin = temperature; kilogram = mass; second = time"),
    ),
)

CULTURE = (
    Relation(
        "founder",
        "The founder of {s} was",
        (
            "Q: Who founded {s}?\nA:",
            "The story of {s} begins with the person who started it,",
            "The early history of {s} is above all the story of its founder,",
        ),
        pairs("""
        IKEA = Ingvar Kamprad; Walmart = Sam Walton; Huawei = Ren Zhengfei; SpaceX = Elon Musk;
        Nintendo = Fusajiro Yamauchi; Motown Records = Berry Gordy; WikiLeaks = Julian Assange;
        Lego = Ole Kirk Christiansen; SoftBank = Masayoshi Son; FedEx = Frederick W. Smith;
        the Bauhaus school of design = Walter Gropius; the Scout movement = Robert Baden-Powell;
        the Sierra Club = John Muir; Christian Science = Mary Baker Eddy; Blue Origin = Jeff Bezos;
        the Latter Day Saint movement = Joseph Smith; Samsung = Lee Byung-chul
        """),
        pairs("Amazon = Jeff Bezos; Dell Technologies = Michael Dell; Playboy magazine = Hugh Hefner"),
        "The founder of {s} was born in the country of",
        BORN_IN,
        "birth_city",
    ),
    Relation(
        "company_country",
        "The company {s} was founded in the country of",
        (
            "Q: Which country does the company {s} come from?\nA:",
            "The first office of {s} opened its doors in",
            "Business historians describe {s} as a company that started out in",
        ),
        pairs("""
        Nokia = Finland; Sony = Japan; Volvo = Sweden; Carlsberg = Denmark; Renault = France;
        Siemens = Germany; Fiat = Italy; Banco Santander = Spain; Swarovski = Austria; Infosys = India;
        Tencent = China; Acer = Taiwan; Embraer = Brazil; Cemex = Mexico; BlackBerry = Canada;
        Qantas = Australia; Statoil = Norway; Swatch = Switzerland; Solvay = Belgium; Kaspersky Lab = Russia
        """),
        pairs("Toyota = Japan; BMW = Germany; Ferrari = Italy; Michelin = France"),
        "The capital of the country where the company {s} was founded is",
        COUNTRY_CAPITAL,
        "capital",
    ),
    Relation(
        "dish_country",
        "The traditional dish {s} comes from the country of",
        (
            "Q: Which country is the home of the dish {s}?\nA:",
            "To taste {s} where it was first cooked, a food lover should fly to",
            "A cookbook with a recipe for {s} would introduce it as a classic of the cuisine of",
        ),
        pairs("""
        paella = Spain; kimchi = South Korea; feijoada = Brazil; poutine = Canada; spanakopita = Greece;
        lomo saltado = Peru; risotto = Italy; haggis = Scotland; sauerbraten = Germany; ratatouille = France;
        doro wat = Ethiopia; gado-gado = Indonesia; pierogi = Poland; bacalhau à Brás = Portugal;
        khachapuri = Georgia; takoyaki = Japan; stroopwafel = the Netherlands; guacamole = Mexico;
        mapo tofu = China; iskender kebab = Turkey
        """),
        pairs("sushi = Japan; pizza = Italy; coq au vin = France; tacos = Mexico"),
        "The main language spoken in the country that gave the world {s} is",
        COUNTRY_LANGUAGE,
        "official_language",
    ),
    Relation(
        "roman_counterpart",
        "The Greek mythical figure {s} was known to the ancient Romans as",
        (
            "Q: What name did the Romans give to the Greek {s}?\nA:",
            "In myths told in Latin, the role of {s} is played by",
            "A poet who writes in Latin instead of Greek replaces the name {s} with",
        ),
        pairs("""
        Hermes = Mercury; Aphrodite = Venus; Athena = Minerva; Artemis = Diana; Hephaestus = Vulcan;
        Demeter = Ceres; Hera = Juno; Cronus = Saturn; Dionysus = Bacchus; Hades = Pluto; Hestia = Vesta;
        Eros = Cupid; Persephone = Proserpina; Heracles = Hercules; Eos = Aurora; Odysseus = Ulysses;
        Asclepius = Aesculapius
        """),
        pairs("Zeus = Jupiter; Poseidon = Neptune; Ares = Mars"),
    ),
    Relation(
        "event_year",
        "In the history books, {s} is dated to the year",
        (
            "Q: In which year did {s} happen?\nA: In",
            "Pupils asked to put {s} on a timeline should mark the year",
            "The calendar year that saw {s} was",
        ),
        pairs("""
        the Battle of Hastings = 1066; the sealing of Magna Carta = 1215; the Battle of Waterloo = 1815;
        the fall of Constantinople to the Ottomans = 1453; the storming of the Bastille = 1789;
        the sinking of the Titanic = 1912; the Battle of Trafalgar = 1805; the Great Fire of London = 1666;
        the Battle of Agincourt = 1415; the Chernobyl disaster = 1986; the Battle of Gettysburg = 1863;
        the signing of the Treaty of Versailles = 1919; the Peace of Westphalia = 1648;
        the Battle of Lepanto = 1571; the great eruption of Krakatoa = 1883;
        the opening of the Suez Canal = 1869; the opening of the Panama Canal = 1914;
        the defeat of the Spanish Armada = 1588; the Battle of Bannockburn = 1314;
        the Battle of Bosworth Field = 1485
        """),
        pairs("""
        the first voyage of Columbus to America = 1492; the fall of the Berlin Wall = 1989;
        the American Declaration of Independence = 1776; the first landing of people on the Moon = 1969
        """),
        "The century in which {s} happened is the",
        YEAR_CENTURY,
    ),
)

RELATIONS = GEOGRAPHY + PEOPLE + ARTS + SCIENCE + CULTURE

UNRELATED = pairs("""
Water freezes into = ice; The opposite of hot is = cold; The opposite of up is = down;
A week has seven = days; A triangle has three = sides; Bees make = honey; Cows give = milk;
The color of fresh grass is = green; The color of a clear sky is = blue; Snow is = white;
Two plus two equals = four; Five plus five equals = ten; Ten minus three equals = seven;
The day after Monday is = Tuesday; The day before Sunday is = Saturday; The month after March is = April;
The first month of the year is = January; The last month of the year is = December;
One minute is made up of sixty = seconds; One hour is made up of sixty = minutes;
A full day and night together last twenty-four = hours; A year has twelve = months;
People see with their = eyes; People hear with their = ears; People smell with the = nose;
The organ that pumps blood through the body is the = heart; A spider has eight = legs;
A car runs on four = wheels; The Earth travels around the = Sun; The Moon travels around the = Earth;
The sun rises in the = east; The sun sets in the = west; At night you can see the moon and the = stars;
Bread is baked in an = oven; Cheese is made from = milk; Wine is made from = grapes;
French fries are made from = potatoes; An omelette is made from = eggs; Books are borrowed from a = library;
Sick people are treated in a = hospital; Children learn to read at = school; Planes land at an = airport;
Trains stop at the = station; Letters are delivered by the = mail;
The ruler of a kingdom is a king or a = queen; The coldest season of the year is = winter;
The mother of your mother is your = grandmother; The brother of your father is your = uncle;
The son of your uncle is your = cousin; A person who bakes bread is called a = baker;
A person who puts out fires is called a = firefighter; A person who teaches is called a = teacher;
The season that follows summer is = autumn;
The number of fingers on one hand is = five; Half of one hundred is = fifty; A dozen means = twelve;
The letter that comes after A in the alphabet is = B; The last letter of the alphabet is = Z;
The frozen continent around the South Pole is = Antarctica; When it rains, people open an = umbrella;
Cutting paper is easiest with a pair of = scissors; To open a locked door you need a = key;
Mixing blue and yellow gives = green; Mixing red and white gives = pink; Ripe bananas are = yellow;
Plants take in light, water and carbon = dioxide; An apple a day keeps the doctor = away;
The past tense of the verb 'go' is = went; The plural of the word 'child' is = children;
The plural of the word 'mouse' is = mice; Salt and = pepper; Romance novels are mostly about = love
""")
