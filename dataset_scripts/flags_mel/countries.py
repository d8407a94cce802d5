"""The states and territories of FlagsMEL and their facts.

Ids are from Wikidata. Continents and regions follow the geoscheme of the United Nations. A fact that is disputed or
changing is empty; a capital may be missing. Languages are the official or most widely used ones, not all of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """A state or territory.

    Args:
        qid (`str`): Wikidata id.
        name (`str`): English name. Two entities may share it.
        aliases (`tuple[str, ...]`): Other names.
        family (`str`): Short name that several countries share ("Congo"), or empty.
        people (`str`): Name of its people, in the plural ("Congolese").
        capital, continent, region, currency (`str`): Facts, empty if unsure.
        languages (`tuple[str, ...]`): At least one.
        form (`str`): `"republic"`, `"kingdom"`, `"territory"`, …
        islands (`bool`): Whether "the islands" can mean the country.
        in_kb (`bool`): Whether the knowledge base has the country. If not, its mentions are NIL.
    """

    qid: str
    name: str
    aliases: tuple[str, ...]
    family: str
    people: str
    capital: str
    continent: str
    region: str
    currency: str
    languages: tuple[str, ...]
    form: str
    islands: bool
    in_kb: bool

    @property
    def attributes(self) -> str:
        """The facts as "Key: value. Key: value.", without empty values."""
        facts = {
            "Capital": self.capital,
            "Continent": self.continent,
            "Currency": self.currency,
            "Languages": ", ".join(self.languages),
            "Region": self.region,
            "Form": self.form + (", islands" if self.islands else ""),
            "People": self.people,
        }
        return " ".join(f"{key}: {value}." for key, value in facts.items() if value)

    @property
    def description(self) -> str:
        """One line in the style of Wikidata's descriptions."""
        region = self.region if self.region[-1] != "n" else f"the {self.region}"
        return f"{'island ' if self.islands else ''}{self.form} in {region}"


# qid | name | aliases | family | people | capital | continent | region | currency | languages | form | islands
_KNOWLEDGE_BASE = """
Q142|France|French Republic||French|Paris|Europe|Western Europe|euro|French|republic|
Q183|Germany|Federal Republic of Germany; Deutschland||Germans|Berlin|Europe|Western Europe|euro|German|republic|
Q38|Italy|Italian Republic||Italians|Rome|Europe|Southern Europe|euro|Italian|republic|
Q27|Ireland|Éire; Republic of Ireland|Ireland|Irish|Dublin|Europe|Northern Europe|euro|Irish; English|republic|
Q31|Belgium|Kingdom of Belgium||Belgians|Brussels|Europe|Western Europe|euro|Dutch; French; German|kingdom|
Q55|Netherlands|Holland; The Netherlands||Dutch|Amsterdam|Europe|Western Europe|euro|Dutch|kingdom|
Q32|Luxembourg|Grand Duchy of Luxembourg||Luxembourgers|Luxembourg City|Europe|Western Europe|euro|Luxembourgish; French; German|grand duchy|
Q40|Austria|Republic of Austria||Austrians|Vienna|Europe|Western Europe|euro|German|republic|
Q39|Switzerland|Swiss Confederation||Swiss|Bern|Europe|Western Europe|Swiss franc|German; French; Italian; Romansh|confederation|
Q35|Denmark|Kingdom of Denmark||Danes|Copenhagen|Europe|Northern Europe|Danish krone|Danish|kingdom|
Q34|Sweden|Kingdom of Sweden||Swedes|Stockholm|Europe|Northern Europe|Swedish krona|Swedish|kingdom|
Q20|Norway|Kingdom of Norway||Norwegians|Oslo|Europe|Northern Europe|Norwegian krone|Norwegian|kingdom|
Q33|Finland|Suomi; Republic of Finland||Finns|Helsinki|Europe|Northern Europe|euro|Finnish; Swedish|republic|
Q189|Iceland|Republic of Iceland||Icelanders|Reykjavík|Europe|Northern Europe|Icelandic króna|Icelandic|republic|
Q4628|Faroe Islands|Faroes||Faroese|Tórshavn|Europe|Northern Europe|Danish krone|Faroese; Danish|territory|islands
Q5689|Åland|Åland Islands||Ålanders|Mariehamn|Europe|Northern Europe|euro|Swedish|territory|islands
Q36|Poland|Republic of Poland||Poles|Warsaw|Europe|Eastern Europe|Polish złoty|Polish|republic|
Q213|Czech Republic|Czechia||Czechs|Prague|Europe|Eastern Europe|Czech koruna|Czech|republic|
Q28|Hungary|Magyarország||Hungarians|Budapest|Europe|Eastern Europe|Hungarian forint|Hungarian|republic|
Q218|Romania|România||Romanians|Bucharest|Europe|Eastern Europe|Romanian leu|Romanian|republic|
Q212|Ukraine|Ukraina||Ukrainians|Kyiv|Europe|Eastern Europe|Ukrainian hryvnia|Ukrainian|republic|
Q159|Russia|Russian Federation||Russians|Moscow|Europe|Eastern Europe|Russian ruble|Russian|federation|
Q191|Estonia|Republic of Estonia||Estonians|Tallinn|Europe|Northern Europe|euro|Estonian|republic|
Q211|Latvia|Republic of Latvia||Latvians|Riga|Europe|Northern Europe|euro|Latvian|republic|
Q41|Greece|Hellenic Republic; Hellas||Greeks|Athens|Europe|Southern Europe|euro|Greek|republic|
Q235|Monaco|Principality of Monaco||Monégasques||Europe|Western Europe|euro|French|principality|
Q233|Malta|Republic of Malta||Maltese|Valletta|Europe|Southern Europe|euro|Maltese; English|republic|islands
Q21|England|||English|London|Europe|Northern Europe|pound sterling|English|country|
Q22|Scotland|Alba||Scots|Edinburgh|Europe|Northern Europe|pound sterling|English; Scots; Scottish Gaelic|country|
Q221|North Macedonia|Republic of North Macedonia||Macedonians|Skopje|Europe|Southern Europe|Macedonian denar|Macedonian; Albanian|republic|
Q399|Armenia|Republic of Armenia||Armenians|Yerevan|Asia|Western Asia|Armenian dram|Armenian|republic|
Q230|Georgia|Sakartvelo|Georgia|Georgians|Tbilisi|Asia|Western Asia|Georgian lari|Georgian|republic|
Q43|Turkey|Türkiye; Republic of Türkiye||Turks|Ankara|Asia|Western Asia|Turkish lira|Turkish|republic|
Q227|Azerbaijan|Republic of Azerbaijan||Azerbaijanis|Baku|Asia|Western Asia|Azerbaijani manat|Azerbaijani|republic|
Q17|Japan|Nippon||Japanese|Tokyo|Asia|Eastern Asia|Japanese yen|Japanese|country|islands
Q148|China|People's Republic of China; PRC||Chinese|Beijing|Asia|Eastern Asia|renminbi|Chinese|republic|
Q884|South Korea|Republic of Korea; ROK|Korea|Koreans|Seoul|Asia|Eastern Asia|South Korean won|Korean|republic|
Q423|North Korea|Democratic People's Republic of Korea; DPRK|Korea|Koreans|Pyongyang|Asia|Eastern Asia|North Korean won|Korean|republic|
Q252|Indonesia|Republic of Indonesia||Indonesians|Jakarta|Asia|South-eastern Asia|Indonesian rupiah|Indonesian|republic|islands
Q869|Thailand|Kingdom of Thailand||Thais|Bangkok|Asia|South-eastern Asia|Thai baht|Thai|kingdom|
Q881|Vietnam|Viet Nam||Vietnamese|Hanoi|Asia|South-eastern Asia|Vietnamese đồng|Vietnamese|republic|
Q836|Myanmar|Burma||Burmese|Naypyidaw|Asia|South-eastern Asia|Myanmar kyat|Burmese|republic|
Q902|Bangladesh|People's Republic of Bangladesh||Bangladeshis|Dhaka|Asia|Southern Asia|Bangladeshi taka|Bengali|republic|
Q668|India|Bharat; Republic of India||Indians|New Delhi|Asia|Southern Asia|Indian rupee|Hindi; English|republic|
Q843|Pakistan|Islamic Republic of Pakistan||Pakistanis|Islamabad|Asia|Southern Asia|Pakistani rupee|Urdu; English|republic|
Q826|Maldives|Republic of Maldives||Maldivians|Malé|Asia|Southern Asia|Maldivian rufiyaa|Dhivehi|republic|islands
Q928|Philippines|Republic of the Philippines||Filipinos|Manila|Asia|South-eastern Asia|Philippine peso|Filipino; English|republic|islands
Q334|Singapore|Republic of Singapore||Singaporeans||Asia|South-eastern Asia|Singapore dollar|English; Malay; Chinese; Tamil|republic|
Q574|East Timor|Timor-Leste||Timorese|Dili|Asia|South-eastern Asia|United States dollar|Tetum; Portuguese|republic|
Q805|Yemen|Republic of Yemen||Yemenis|Sanaa|Asia|Western Asia|Yemeni rial|Arabic|republic|
Q878|United Arab Emirates|UAE; Emirates||Emiratis|Abu Dhabi|Asia|Western Asia|Emirati dirham|Arabic|federation|
Q846|Qatar|State of Qatar||Qataris|Doha|Asia|Western Asia|Qatari riyal|Arabic|emirate|
Q398|Bahrain|Kingdom of Bahrain||Bahrainis|Manama|Asia|Western Asia|Bahraini dinar|Arabic|kingdom|islands
Q817|Kuwait|State of Kuwait||Kuwaitis|Kuwait City|Asia|Western Asia|Kuwaiti dinar|Arabic|emirate|
Q810|Jordan|Hashemite Kingdom of Jordan||Jordanians|Amman|Asia|Western Asia|Jordanian dinar|Arabic|kingdom|
Q1033|Nigeria|Federal Republic of Nigeria||Nigerians|Abuja|Africa|Western Africa|Nigerian naira|English|republic|
Q1032|Niger|Republic of the Niger||Nigeriens|Niamey|Africa|Western Africa|West African CFA franc|French; Hausa|republic|
Q912|Mali|Republic of Mali||Malians|Bamako|Africa|Western Africa|West African CFA franc|French; Bambara|republic|
Q1006|Guinea|Guinea-Conakry; Republic of Guinea|Guinea|Guineans|Conakry|Africa|Western Africa|Guinean franc|French|republic|
Q1007|Guinea-Bissau|Republic of Guinea-Bissau|Guinea|Guineans|Bissau|Africa|Western Africa|West African CFA franc|Portuguese|republic|
Q983|Equatorial Guinea|Republic of Equatorial Guinea|Guinea|Guineans||Africa|Middle Africa|Central African CFA franc|Spanish; French; Portuguese|republic|
Q1041|Senegal|Republic of Senegal||Senegalese|Dakar|Africa|Western Africa|West African CFA franc|French; Wolof|republic|
Q1009|Cameroon|Republic of Cameroon||Cameroonians|Yaoundé|Africa|Middle Africa|Central African CFA franc|French; English|republic|
Q657|Chad|Republic of Chad||Chadians|N'Djamena|Africa|Middle Africa|Central African CFA franc|French; Arabic|republic|
Q1008|Ivory Coast|Côte d'Ivoire||Ivorians|Yamoussoukro|Africa|Western Africa|West African CFA franc|French|republic|
Q974|Democratic Republic of the Congo|DR Congo; Congo-Kinshasa; DRC|Congo|Congolese|Kinshasa|Africa|Middle Africa|Congolese franc|French; Lingala; Swahili|republic|
Q971|Republic of the Congo|Congo-Brazzaville|Congo|Congolese|Brazzaville|Africa|Middle Africa|Central African CFA franc|French; Lingala; Kituba|republic|
Q1049|Sudan|Republic of the Sudan|Sudan|Sudanese|Khartoum|Africa|Northern Africa|Sudanese pound|Arabic; English|republic|
Q958|South Sudan|Republic of South Sudan|Sudan|Sudanese|Juba|Africa|Eastern Africa|South Sudanese pound|English|republic|
Q962|Benin|Republic of Benin||Beninese|Porto-Novo|Africa|Western Africa|West African CFA franc|French|republic|
Q965|Burkina Faso|||Burkinabè|Ouagadougou|Africa|Western Africa|West African CFA franc|Mossi; French|republic|
Q945|Togo|Togolese Republic||Togolese|Lomé|Africa|Western Africa|West African CFA franc|French; Ewe|republic|
Q117|Ghana|Republic of Ghana||Ghanaians|Accra|Africa|Western Africa|Ghanaian cedi|English|republic|
Q1044|Sierra Leone|Republic of Sierra Leone||Sierra Leoneans|Freetown|Africa|Western Africa|Sierra Leonean leone|English; Krio|republic|
Q1005|The Gambia|Gambia||Gambians|Banjul|Africa|Western Africa|Gambian dalasi|English|republic|
Q1019|Madagascar|Republic of Madagascar||Malagasy|Antananarivo|Africa|Eastern Africa|Malagasy ariary|Malagasy; French|republic|
Q924|Tanzania|United Republic of Tanzania||Tanzanians|Dodoma|Africa|Eastern Africa|Tanzanian shilling|Swahili; English|republic|
Q1045|Somalia|Federal Republic of Somalia||Somalis|Mogadishu|Africa|Eastern Africa|Somali shilling|Somali; Arabic|republic|
Q115|Ethiopia|Federal Democratic Republic of Ethiopia||Ethiopians|Addis Ababa|Africa|Eastern Africa|Ethiopian birr|Amharic; Oromo|republic|
Q1016|Libya|State of Libya||Libyans|Tripoli|Africa|Northern Africa|Libyan dinar|Arabic|country|
Q262|Algeria|People's Democratic Republic of Algeria||Algerians|Algiers|Africa|Northern Africa|Algerian dinar|Arabic; Berber|republic|
Q948|Tunisia|Republic of Tunisia||Tunisians|Tunis|Africa|Northern Africa|Tunisian dinar|Arabic|republic|
Q1028|Morocco|Kingdom of Morocco||Moroccans|Rabat|Africa|Northern Africa|Moroccan dirham|Arabic; Berber|kingdom|
Q1025|Mauritania|Islamic Republic of Mauritania||Mauritanians|Nouakchott|Africa|Western Africa|Mauritanian ouguiya|Arabic|republic|
Q977|Djibouti|Republic of Djibouti||Djiboutians|Djibouti City|Africa|Eastern Africa|Djiboutian franc|French; Arabic|republic|
Q929|Central African Republic|CAR||Central Africans|Bangui|Africa|Middle Africa|Central African CFA franc|French; Sango|republic|
Q1039|São Tomé and Príncipe|Democratic Republic of São Tomé and Príncipe||Santomeans|São Tomé|Africa|Middle Africa|dobra|Portuguese|republic|islands
Q1011|Cape Verde|Cabo Verde||Cape Verdeans|Praia|Africa|Western Africa|Cape Verdean escudo|Portuguese|republic|islands
Q970|Comoros|Union of the Comoros||Comorians|Moroni|Africa|Eastern Africa|Comorian franc|Comorian; Arabic; French|republic|islands
Q1042|Seychelles|Republic of Seychelles||Seychellois|Victoria|Africa|Eastern Africa|Seychellois rupee|English; French; Seychellois Creole|republic|islands
Q258|South Africa|Republic of South Africa; RSA||South Africans|Pretoria|Africa|Southern Africa|South African rand|English; Zulu; Xhosa; Afrikaans|republic|
Q1014|Liberia|Republic of Liberia||Liberians|Monrovia|Africa|Western Africa|Liberian dollar|English|republic|
Q1037|Rwanda|Republic of Rwanda||Rwandans|Kigali|Africa|Eastern Africa|Rwandan franc|Kinyarwanda; English; French|republic|
Q739|Colombia|Republic of Colombia||Colombians|Bogotá|South America|South America|Colombian peso|Spanish|republic|
Q736|Ecuador|Republic of Ecuador||Ecuadorians|Quito|South America|South America|United States dollar|Spanish|republic|
Q419|Peru|Republic of Peru||Peruvians|Lima|South America|South America|Peruvian sol|Spanish; Quechua|republic|
Q298|Chile|Republic of Chile||Chileans|Santiago|South America|South America|Chilean peso|Spanish|republic|
Q730|Suriname|Republic of Suriname||Surinamese|Paramaribo|South America|South America|Surinamese dollar|Dutch|republic|
Q734|Guyana|Co-operative Republic of Guyana||Guyanese|Georgetown|South America|South America|Guyanese dollar|English|republic|
Q241|Cuba|Republic of Cuba||Cubans|Havana|North America|Caribbean|Cuban peso|Spanish|republic|
Q1183|Puerto Rico|Commonwealth of Puerto Rico||Puerto Ricans|San Juan|North America|Caribbean|United States dollar|Spanish; English|territory|
Q804|Panama|Republic of Panama||Panamanians|Panama City|North America|Central America|Panamanian balboa|Spanish|republic|
Q783|Honduras|Republic of Honduras||Hondurans|Tegucigalpa|North America|Central America|Honduran lempira|Spanish|republic|
Q800|Costa Rica|Republic of Costa Rica||Costa Ricans|San José|North America|Central America|Costa Rican colón|Spanish|republic|
Q778|The Bahamas|Bahamas||Bahamians|Nassau|North America|Caribbean|Bahamian dollar|English|country|islands
Q784|Dominica|Commonwealth of Dominica||Dominicans|Roseau|North America|Caribbean|East Caribbean dollar|English|republic|
Q786|Dominican Republic|||Dominicans|Santo Domingo|North America|Caribbean|Dominican peso|Spanish|republic|
Q754|Trinidad and Tobago|Republic of Trinidad and Tobago||Trinidadians and Tobagonians|Port of Spain|North America|Caribbean|Trinidad and Tobago dollar|English|republic|islands
Q760|Saint Lucia|St. Lucia||Saint Lucians|Castries|North America|Caribbean|East Caribbean dollar|English|country|
Q757|Saint Vincent and the Grenadines|St. Vincent and the Grenadines||Vincentians|Kingstown|North America|Caribbean|East Caribbean dollar|English|country|islands
Q790|Haiti|Republic of Haiti||Haitians|Port-au-Prince|North America|Caribbean|Haitian gourde|French; Haitian Creole|republic|
Q223|Greenland|Kalaallit Nunaat||Greenlanders|Nuuk|North America|Northern America|Danish krone|Greenlandic; Danish|territory|
Q30|United States|United States of America; USA||Americans|Washington|North America|Northern America|United States dollar|English|republic|
Q1428|Georgia|State of Georgia; Peach State|Georgia|Georgians|Atlanta|North America|Northern America|United States dollar|English|state|
Q1439|Texas|State of Texas; Lone Star State||Texans|Austin|North America|Northern America|United States dollar|English|state|
Q1522|New Mexico|State of New Mexico||New Mexicans|Santa Fe|North America|Northern America|United States dollar|English; Spanish|state|
Q1261|Colorado|State of Colorado||Coloradans|Denver|North America|Northern America|United States dollar|English|state|
Q173|Alabama|State of Alabama||Alabamians|Montgomery|North America|Northern America|United States dollar|English|state|
Q816|Arizona|State of Arizona||Arizonans|Phoenix|North America|Northern America|United States dollar|English|state|
Q1454|North Carolina|State of North Carolina|Carolina|Carolinians|Raleigh|North America|Northern America|United States dollar|English|state|
Q1456|South Carolina|State of South Carolina|Carolina|Carolinians|Columbia|North America|Northern America|United States dollar|English|state|
Q691|Papua New Guinea|Independent State of Papua New Guinea; PNG|Guinea|Guineans|Port Moresby|Oceania|Melanesia|Papua New Guinean kina|English; Tok Pisin; Hiri Motu|country|
Q683|Samoa|Independent State of Samoa; Western Samoa|Samoa|Samoans|Apia|Oceania|Polynesia|Samoan tālā|Samoan; English|country|islands
Q16641|American Samoa|Territory of American Samoa|Samoa|Samoans|Pago Pago|Oceania|Polynesia|United States dollar|Samoan; English|territory|islands
Q695|Palau|Republic of Palau||Palauans|Ngerulmud|Oceania|Micronesia|United States dollar|Palauan; English|republic|islands
Q702|Federated States of Micronesia|FSM||Micronesians|Palikir|Oceania|Micronesia|United States dollar|English|federation|islands
Q678|Tonga|Kingdom of Tonga||Tongans|Nukuʻalofa|Oceania|Polynesia|Tongan paʻanga|Tongan; English|kingdom|islands
Q709|Marshall Islands|Republic of the Marshall Islands||Marshallese|Majuro|Oceania|Micronesia|United States dollar|Marshallese; English|republic|islands
Q685|Solomon Islands|||Solomon Islanders|Honiara|Oceania|Melanesia|Solomon Islands dollar|English|country|islands
"""

# Countries that are not in the knowledge base: the gold of their mentions is NIL.
_OUTSIDE = """
Q26|Northern Ireland||Ireland|Irish|Belfast|Europe|Northern Europe|pound sterling|English; Irish|country|
Q219|Bulgaria|Republic of Bulgaria||Bulgarians|Sofia|Europe|Eastern Europe|euro|Bulgarian|republic|
Q37|Lithuania|Republic of Lithuania||Lithuanians|Vilnius|Europe|Northern Europe|euro|Lithuanian|republic|
Q819|Laos|Lao PDR||Laotians|Vientiane|Asia|South-eastern Asia|Lao kip|Lao|republic|
Q1000|Gabon|Gabonese Republic||Gabonese|Libreville|Africa|Middle Africa|Central African CFA franc|French|republic|
Q963|Botswana|Republic of Botswana||Batswana|Gaborone|Africa|Southern Africa|Botswana pula|English; Tswana|republic|
Q1027|Mauritius|Republic of Mauritius||Mauritians|Port Louis|Africa|Eastern Africa|Mauritian rupee|English; French|republic|islands
Q766|Jamaica|||Jamaicans|Kingston|North America|Caribbean|Jamaican dollar|English|country|
Q750|Bolivia|Plurinational State of Bolivia||Bolivians|Sucre|South America|South America|boliviano|Spanish; Quechua; Aymara|republic|
Q697|Nauru|Republic of Nauru||Nauruans|Yaren|Oceania|Micronesia|Australian dollar|Nauruan; English|republic|
"""


def _parse(table: str, in_kb: bool) -> list[Country]:
    countries = []
    for line in table.strip().splitlines():
        qid, name, aliases, family, people, capital, continent, region, currency, languages, form, isles = line.split(
            "|"
        )
        countries.append(
            Country(
                qid=qid,
                name=name,
                aliases=tuple(alias for alias in aliases.split("; ") if alias),
                family=family,
                people=people,
                capital=capital,
                continent=continent,
                region=region,
                currency=currency,
                languages=tuple(languages.split("; ")),
                form=form,
                islands=bool(isles),
                in_kb=in_kb,
            )
        )
    return countries


#: All states and territories, those of the knowledge base first.
COUNTRIES: tuple[Country, ...] = (*_parse(_KNOWLEDGE_BASE, True), *_parse(_OUTSIDE, False))

BY_QID: dict[str, Country] = {country.qid: country for country in COUNTRIES}
