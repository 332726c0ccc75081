// A wallet for a chain of one's own: it signs for real, with an Ed25519 key that this browser made and keeps. It asks
// nobody before it signs, and is loaded by `diffusionz serve --dev` alone.

const STORE = "diffusionz-dev-wallet";
const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const CHAIN = "solana:localnet";

function base58(bytes) {
  let value = BigInt("0x" + [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
  let text = "";
  for (; value > 0n; value /= 58n) text = ALPHABET[Number(value % 58n)] + text;
  for (const byte of bytes) {
    if (byte) break;
    text = "1" + text;
  }
  return text;
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const toBase64 = (bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes)));

/** The key of this browser: {address, publicKey, sign}. */
async function keyPair() {
  let stored = JSON.parse(localStorage.getItem(STORE) ?? "null");
  if (!stored) {
    const pair = await crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"]);
    stored = {
      private: toBase64(await crypto.subtle.exportKey("pkcs8", pair.privateKey)),
      public: toBase64(await crypto.subtle.exportKey("raw", pair.publicKey)),
    };
    localStorage.setItem(STORE, JSON.stringify(stored));
  }
  const key = await crypto.subtle.importKey("pkcs8", fromBase64(stored.private), "Ed25519", false, ["sign"]);
  const publicKey = fromBase64(stored.public);
  return {
    publicKey,
    address: base58(publicKey),
    sign: async (bytes) => new Uint8Array(await crypto.subtle.sign("Ed25519", key, bytes)),
  };
}

/** The text that `solana:signIn` stands for, as all wallets write it. */
function signInText(input, address) {
  let text = `${input.domain} wants you to sign in with your Solana account:\n${address}`;
  if (input.statement) text += `\n\n${input.statement}`;
  const lines = [
    ["URI", input.uri],
    ["Version", input.version],
    ["Chain ID", input.chainId],
    ["Nonce", input.nonce],
    ["Issued At", input.issuedAt],
    ["Expiration Time", input.expirationTime],
    ["Not Before", input.notBefore],
    ["Request ID", input.requestId],
  ]
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${name}: ${value}`);
  if (input.resources) lines.push("Resources:", ...input.resources.map((resource) => `- ${resource}`));
  return lines.length ? `${text}\n\n${lines.join("\n")}` : text;
}

class DevWallet {
  #pair = null;
  #accounts = [];
  version = "1.0.0";
  name = "Dev wallet";
  icon =
    "data:image/svg+xml;base64," +
    btoa(
      '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#0a6650"/><path d="M9 11h14v11H9zM9 11l10-4v4M19 16h4" fill="none" stroke="#fff" stroke-width="2"/></svg>',
    );
  chains = [CHAIN];

  get accounts() {
    return this.#accounts;
  }

  get features() {
    return {
      "standard:connect": { version: "1.0.0", connect: () => this.#connect() },
      "standard:disconnect": {
        version: "1.0.0",
        disconnect: async () => {
          this.#accounts = [];
        },
      },
      "standard:events": { version: "1.0.0", on: () => () => {} },
      "solana:signIn": { version: "1.0.0", signIn: (...inputs) => this.#signIn(inputs) },
      "solana:signMessage": { version: "1.1.0", signMessage: (...inputs) => this.#signMessage(inputs) },
    };
  }

  async #connect() {
    if (!this.#pair) {
      try {
        this.#pair = await keyPair();
      } catch {
        throw new Error("this browser makes no Ed25519 keys here; use a newer one, over https or on localhost");
      }
    }
    const { address, publicKey } = this.#pair;
    this.#accounts = [
      Object.freeze({
        address,
        publicKey,
        chains: this.chains,
        features: ["solana:signIn", "solana:signMessage"],
        label: "Dev",
      }),
    ];
    return { accounts: this.#accounts };
  }

  async #signIn(inputs) {
    const {
      accounts: [account],
    } = await this.#connect();
    return Promise.all(
      (inputs.length ? inputs : [{}]).map(async (input) => {
        if (input.address && input.address !== account.address) throw new Error("this is another wallet's address");
        const signedMessage = new TextEncoder().encode(
          signInText({ domain: location.host, ...input }, account.address),
        );
        return { account, signedMessage, signature: await this.#pair.sign(signedMessage), signatureType: "ed25519" };
      }),
    );
  }

  async #signMessage(inputs) {
    await this.#connect();
    return Promise.all(
      inputs.map(async ({ message }) => ({
        signedMessage: message,
        signature: await this.#pair.sign(message),
        signatureType: "ed25519",
      })),
    );
  }
}

const wallet = new DevWallet();
const register = ({ register }) => register(wallet);
addEventListener("wallet-standard:app-ready", (event) => register(event.detail));
dispatchEvent(new CustomEvent("wallet-standard:register-wallet", { detail: register }));
