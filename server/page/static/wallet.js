// Solana wallets of this browser, by the Wallet Standard, or as wallets were before it; and signing in with one.
// https://github.com/wallet-standard/wallet-standard

import { Problem, api } from "./base.js";

const CONNECT = "standard:connect",
  SIGN_IN = "solana:signIn",
  SIGN_MESSAGE = "solana:signMessage";
const ICON = /^data:image\/(svg\+xml|webp|png|gif|jpeg);base64,[A-Za-z0-9+/=]+$/; // what the standard allows

/** Calls `changed` with the wallets that are there, and again when one comes or goes. */
export function watchWallets(changed) {
  const standard = new Set();
  const tell = () => {
    const found = [...standard].filter(fits).map(fromStandard);
    const names = new Set(found.map(({ name }) => name));
    changed([...found, ...older().filter(({ name }) => !names.has(name))]);
  };
  const api = Object.freeze({
    register(...wallets) {
      for (const wallet of wallets) standard.add(wallet);
      tell();
      return () => {
        for (const wallet of wallets) standard.delete(wallet);
        tell();
      };
    },
  });
  // Whoever comes second calls: wallets that are there already answer app-ready, later ones send register-wallet.
  addEventListener("wallet-standard:register-wallet", (event) => event.detail(api));
  dispatchEvent(new CustomEvent("wallet-standard:app-ready", { detail: api }));
  tell();
  setTimeout(tell, 1000); // older wallets tell nobody when they come
}

function fits(wallet) {
  const { chains = [], features = {} } = wallet;
  return (
    chains.some((chain) => chain.startsWith("solana:")) &&
    CONNECT in features &&
    (SIGN_IN in features || SIGN_MESSAGE in features)
  );
}

/** {name, icon, connect() -> {address, sign(challenge) -> base64 of the signature}} */
function fromStandard(wallet) {
  return {
    name: wallet.name,
    icon: ICON.test(wallet.icon) ? wallet.icon : null,
    async connect() {
      const { accounts } = await wallet.features[CONNECT].connect();
      const account = accounts.find(({ chains }) => chains.some((chain) => chain.startsWith("solana:")));
      if (!account) throw new Problem({ title: `${wallet.name} has no Solana account` });
      return {
        address: account.address,
        async sign({ text, input }) {
          const message = new TextEncoder().encode(text);
          if (SIGN_IN in wallet.features) {
            const [output] = await wallet.features[SIGN_IN].signIn(input);
            // A wallet that writes the text in a way of its own has signed what the server does not expect.
            if (same(output.signedMessage, message) || !(SIGN_MESSAGE in wallet.features))
              return base64(output.signature);
          }
          const [output] = await wallet.features[SIGN_MESSAGE].signMessage({ account, message });
          return base64(output.signature);
        },
      };
    },
  };
}

function older() {
  const found = [];
  const add = (name, provider) => {
    if (typeof provider?.connect !== "function" || typeof provider.signMessage !== "function") return;
    if (found.some((other) => other.provider === provider)) return;
    found.push({
      name,
      icon: null,
      provider,
      async connect() {
        const key = (await provider.connect())?.publicKey ?? provider.publicKey;
        return {
          address: key.toString(),
          async sign({ text }) {
            const signed = await provider.signMessage(new TextEncoder().encode(text), "utf8");
            return base64(signed.signature ?? signed);
          },
        };
      },
    });
  };
  add("Phantom", window.phantom?.solana);
  add("Solflare", window.solflare);
  add("Backpack", window.backpack);
  add(window.solana?.isPhantom ? "Phantom" : "Solana wallet", window.solana);
  return found;
}

/** What POST /api/sign-in answers, after the wallet has signed the server's text. `step` is told what is asked. */
export async function signIn(wallet, step) {
  try {
    step(`Connecting to ${wallet.name}`);
    const { address, sign } = await wallet.connect();
    const challenge = await api("/api/sign-in/challenge", { body: { address } });
    step(`Look at ${wallet.name}: it asks whether you sign in`);
    const signature = await sign(challenge);
    step("Signing in");
    return await api("/api/sign-in", { body: { address, nonce: challenge.nonce, signature } });
  } catch (error) {
    if (error instanceof Problem) throw error;
    // 4001 is what wallets say when their owner declines.
    if (error?.code === 4001 || /reject|declin|denied|cancel/i.test(error?.message ?? "")) {
      throw new Problem({ title: "The wallet was not used", detail: "You declined in the wallet. Nothing happened." });
    }
    throw new Problem({ title: `${wallet.name} did not sign`, detail: error?.message ?? String(error) });
  }
}

function same(a, b) {
  return a?.length === b.length && b.every((byte, i) => byte === a[i]);
}

export function base64(bytes) {
  return btoa(String.fromCharCode(...new Uint8Array(bytes)));
}
